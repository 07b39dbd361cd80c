"""What the driver says of a GPU, against a stand-in for its library."""

import sys

import pytest

from compress.bench.nvml import Clocks, Gpu, Tenants, open_gpu
from tests.fake_nvml import UUID, FakeNvml

OWN, PARENT = 70, 69


def opened(library: FakeNvml) -> Gpu:
    gpu = open_gpu(UUID, library)
    assert isinstance(gpu, Gpu)
    return gpu


def test_a_gpu_is_found_by_its_uuid_whatever_the_prefix() -> None:
    assert isinstance(open_gpu(f"GPU-{UUID}", FakeNvml()), Gpu)
    assert isinstance(open_gpu(UUID, FakeNvml()), Gpu)
    assert isinstance(open_gpu(UUID, FakeNvml(uuid=f"MIG-{UUID}")), Gpu)
    assert open_gpu("other", FakeNvml()) == "NVML does not know the GPU other: Not Found"


def test_without_the_library_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "nvidia-ml-py is not installed" in str(open_gpu(UUID))
    library = FakeNvml()
    library.refuses.add("init")
    assert open_gpu(UUID, library) == "NVML does not start: Not Supported"


def test_what_holds_the_clocks_back() -> None:
    library = FakeNvml()
    library.reasons = 0x4 | 0x40 | 0x1
    library.slowed = {270: 5}
    found = opened(library).clocks()
    assert found == Clocks(
        ("thermal slowdown by the hardware",), True, {"thermal slowdown by the hardware": 5}
    )
    library.refuses |= {"fields"}
    assert opened(library).clocks() == Clocks(("thermal slowdown by the hardware",), True, {})
    library.refuses |= {"reasons"}
    assert "Not Supported" in str(opened(library).clocks())


def test_the_record() -> None:
    library = FakeNvml()
    assert opened(library).described() == {"driver": "580.1", "power_limit_watts": 700.0}
    library.refuses.add("power")
    assert opened(library).described() == {"driver": "580.1", "undescribed": "Not Supported"}


def tenants(library: FakeNvml, *, parent_holds: bool = False) -> Tenants:
    return Tenants(opened(library), OWN, PARENT, parent_holds=parent_holds)


def test_alone() -> None:
    library = FakeNvml()
    found = tenants(library)
    library.processes[OWN] = 12
    found.look()
    assert found.foreign == set()
    assert found.own_bytes() == 12


def test_in_a_container_the_one_new_entry_is_ours() -> None:
    library = FakeNvml()
    found = tenants(library)
    library.processes[4711] = 12
    found.look()
    assert (found.foreign, found.own_bytes()) == (set(), 12)
    library.processes[4712] = 3
    found.look()
    assert (found.foreign, found.own_bytes()) == ({4712}, 12)
    del library.processes[4712]
    found.look()
    assert found.foreign == {4712}


def test_who_was_there_before_is_foreign_even_under_our_number() -> None:
    library = FakeNvml()
    library.processes[OWN] = 1
    found = tenants(library)
    library.processes[4711] = 12
    found.look()
    assert (found.foreign, found.own_bytes()) == ({OWN}, 12)


def test_two_that_come_at_once_are_foreign_unless_one_has_our_number() -> None:
    library = FakeNvml()
    found, known = tenants(library), tenants(library)
    library.processes |= {4711: 1, 4712: 2}
    found.look()
    assert found.foreign == {4711, 4712}
    assert found.own_bytes() == "NVML does not list this process"
    library.processes = {4711: 1, OWN: 2}
    known.look()
    assert (known.foreign, known.own_bytes()) == ({4711}, 2)


def test_the_process_that_waits_for_us_is_not_foreign() -> None:
    library = FakeNvml()
    library.processes[PARENT] = 5
    assert tenants(library).foreign == set()
    library.processes = {4000: 5}
    assert tenants(library).foreign == {4000}
    assert tenants(library, parent_holds=True).foreign == set()
    library.processes = {4000: 5, 4001: 5}
    assert tenants(library, parent_holds=True).foreign == {4000, 4001}


def test_what_the_driver_does_not_tell_is_no_number() -> None:
    library = FakeNvml()
    found = tenants(library)
    found.look()
    assert found.own_bytes() == "NVML lists no process of the GPU, not even this one"
    library.processes[OWN] = None
    assert found.own_bytes() == "NVML does not tell the memory of single processes here"
    library.refuses.add("processes")
    assert "Not Supported" in str(found.own_bytes())
