import torch

from compress.training.reading import Documents


def test_rows_are_cut_to_the_longest_document_and_padding_is_masked() -> None:
    rows = torch.tensor([[1, 5, 6, -1, -1], [-1, 7, 8, 9, -1]])
    found = Documents.of(rows, padding=0)
    assert found.labels.tolist() == [1, -1]
    assert found.inputs["input_ids"].tolist() == [[5, 6, 0], [7, 8, 9]]
    assert found.inputs["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert found.counted.tolist() == [[True, True, False], [True, True, True]]
