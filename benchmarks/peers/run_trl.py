"""TRL's trainer of generalised knowledge distillation, on the text alone (`lmbda` 0), in its environment.

Its `beta` 0 is the forward divergence. Presets: `plain` keeps what blocks compute, as ours does; `default`
is its own choice, gradient checkpointing.
"""

import torch
from hugging_face_lesson import Collator, Marks, arguments_of, listen, rows_of, tokenizer_of
from lesson import Watch, parse_lesson
from transformers import AutoModelForCausalLM
from trl.experimental.gkd import GKDConfig, GKDTrainer

PRESETS = ("plain", "default")


def main() -> None:
    lesson = parse_lesson((__doc__ or "").splitlines()[0], PRESETS)
    watch = Watch()
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (lesson.student, lesson.teacher)
    )
    options = {} if lesson.preset == "default" else {"gradient_checkpointing": False}
    trainer = GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=GKDConfig(**arguments_of(lesson), lmbda=0.0, beta=0.0, temperature=1.0, **options),
        data_collator=Collator(watch),
        train_dataset=rows_of(lesson),
        processing_class=tokenizer_of(student.config.vocab_size),
        callbacks=[Marks(watch)],
    )
    listen(trainer, lesson, watch)
    trainer.train()
    watch.write(lesson, ("trl", "transformers", "torch", "accelerate"))


if __name__ == "__main__":
    main()
