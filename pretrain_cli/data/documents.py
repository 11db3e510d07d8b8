"""Which document each token of a sample belongs to, from the tokens themselves."""

import numpy as np


def document_numbers(tokens: np.ndarray, separator: int, *, leads: bool) -> np.ndarray:
    """Number the documents of each row, in order. (..., T) -> (..., T) int64.

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
    numbers = separators.cumsum(-1)
    return numbers if leads else numbers - separators
