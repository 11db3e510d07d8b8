"""Advice for errors that mean a limit of the system. The writing of files is tested where they are
written."""

import errno

import pytest

from pretrain_cli.files import advice_on_limit


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "make room"),
        (errno.EMFILE, "raise the limit on open files with 'ulimit -n 1024'"),
        (errno.ENOMEM, "raise the limit on memory with 'ulimit -v unlimited', or free some"),
        (errno.EIO, None),
    ],
)
def test_an_error_at_a_limit_comes_with_advice(number, advice):
    assert advice_on_limit(OSError(number, "said")) == advice
