"""The garbage collector comes back."""

import gc

import pytest

from spin_ray.imports import without_gc


def test_the_collector_is_on_again_also_after_an_error_and_from_within():
    with without_gc():
        assert not gc.isenabled()
        with pytest.raises(ImportError), without_gc():
            raise ImportError
        assert not gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count()
