"""DistillKit with a teacher at hand and its divergence alone, in its environment.

The models, the trainer and the source of the teacher's logits are made as its command makes them; rows come
from a tensor, which its command does not read. Presets: `plain` keeps what blocks compute, as ours does;
`default` recomputes them (gradient checkpointing), as every example of its own does.
"""

import torch
from distillkit.configuration import DistillationRunConfig
from distillkit.signals import OnlineSignalSource
from distillkit.trainer import DistillationTrainer
from hugging_face_lesson import Collator, Marks, arguments_of, listen, rows_of, tokenizer_of
from lesson import Lesson, Watch, parse_lesson
from transformers import AutoModelForCausalLM
from trl import SFTConfig

PRESETS = ("plain", "default")


def configuration(lesson: Lesson) -> DistillationRunConfig:
    return DistillationRunConfig.model_validate(
        {
            "model": str(lesson.student),
            "teacher": {"kind": "hf", "path": str(lesson.teacher)},
            "dataset": {"train_dataset": {"disk_path": str(lesson.tokens)}},
            "sequence_length": 1024,
            "output_path": str(lesson.out / "trained"),
            "use_flash_attention": False,
            "loss_functions": [{"function": "kl", "weight": 1.0, "temperature": 1.0}],
        }
    )


def main() -> None:
    lesson = parse_lesson((__doc__ or "").splitlines()[0], PRESETS)
    watch = Watch()
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (lesson.student, lesson.teacher)
    )
    vocabulary = student.config.vocab_size
    options = {"gradient_checkpointing": lesson.preset == "default"}
    trainer = DistillationTrainer(
        model=student,
        config=configuration(lesson),
        signal_source=OnlineSignalSource(teacher, vocab_size=vocabulary),
        true_vocab_size=vocabulary,
        args=SFTConfig(**arguments_of(lesson), **options),
        data_collator=Collator(watch),
        train_dataset=rows_of(lesson),
        processing_class=tokenizer_of(vocabulary),
        callbacks=[Marks(watch)],
    )
    listen(trainer, lesson, watch)
    trainer.train()
    watch.write(lesson, ("distillkit", "trl", "transformers", "torch", "accelerate"))


if __name__ == "__main__":
    main()
