"""The memory of large tensors is kept while a run lasts, and only then; test_allocator.py runs this file."""

import platform

import pytest
import torch

from torchthaw.backbones import allocator
from torchthaw.backbones.allocator import tensors_kept_in_memory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is spoken to")

BYTES = 64 * 2**20
PAGES = BYTES // 4096


@pytest.fixture(autouse=True)
def _nothing_in_the_environment(monkeypatch):
    for name in allocator._SETTINGS:
        monkeypatch.delenv(name, raising=False)


def page_faults():
    """Pages that the system cleared while large tensors were made and freed, one after the other."""
    import resource

    # Twice as large as the ones that follow: a small object that takes a piece of its memory leaves room for them.
    torch.zeros(2 * BYTES // 4).add_(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.zeros(BYTES // 4).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_freed_memory_serves_the_next_tensor_while_it_lasts():
    # Huge pages of the system would count as one.
    if page_faults() < 4 * PAGES:
        pytest.skip("the system maps large memory in huge pages")
    with tensors_kept_in_memory():
        inside = page_faults()
        with tensors_kept_in_memory():
            pass
        after_inner = page_faults()
    assert inside < PAGES / 4
    assert after_inner < PAGES / 4, "an inner end does not end the outer"
    assert page_faults() > 4 * PAGES


def test_an_end_by_an_error_is_an_end():
    def fail():
        with tensors_kept_in_memory():
            raise RuntimeError("on purpose")

    usual = page_faults()
    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert page_faults() > usual / 2


def test_who_has_set_the_allocator_is_left_alone(monkeypatch):
    usual = page_faults()
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "65536")
    with tensors_kept_in_memory():
        assert page_faults() > usual / 2


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("musl", "1.2"))
    allocator._mallopt.cache_clear()
    try:
        usual = page_faults()
        with tensors_kept_in_memory():
            assert page_faults() > usual / 2
    finally:
        allocator._mallopt.cache_clear()
