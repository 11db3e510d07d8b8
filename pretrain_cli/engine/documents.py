"""Which document each token of a sample belongs to, from the tokens themselves."""

from torch import Tensor

from pretrain_cli.data.dataset import Dataset


def documents_of(tokens: Tensor, dataset: Dataset) -> Tensor:
    """Number the documents in samples of this dataset. (B, T) -> (B, T)."""
    return document_numbers(tokens, dataset.separator, leads=dataset.separator_leads)


def document_numbers(tokens: Tensor, separator: int, *, leads: bool) -> Tensor:
    """Number the documents of each row, in order. (B, T) -> (B, T).

    A document ends with its separator or, where that `leads`, begins with it. Of a document that
    the row's start cuts, the rest is one.

        tokens     o  c  a  t  ▪  d  o  g  ▪  ▪  e
        ends       0  0  0  0  0  1  1  1  1  2  3
        leads      0  0  0  0  1  1  1  1  2  3  3

    The targets stay as they are: the last token of a document still predicts the first of the next.
    For a tokenizer without a beginning mark, that is how text sampled from nothing begins; and
    every step's loss stays a mean over as many tokens.
    """
    separators = tokens == separator
    numbers = separators.cumsum(1)
    return numbers if leads else numbers - separators.long()
