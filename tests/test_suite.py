"""What the tests promise of themselves."""

import re
import time
from pathlib import Path

import mutations
import pytest
from conftest import LONG_FIRST
from hypothesis import given, settings
from hypothesis import strategies as st

HERE = Path(__file__).parent


def test_a_slow_machine_fails_no_property():
    @settings(max_examples=2)
    @given(st.integers(0, 1))
    def takes_longer_than_hypothesis_allows_by_itself(_):
        time.sleep(0.25)

    takes_longer_than_hypothesis_allows_by_itself()


def test_one_module_starts_the_processes_of_all_tests():
    starts = re.compile(
        r"\bsubprocess\.(Popen|run|call|check_\w+)\(|\.Process\(target|\bos\.fork\(|start_new_session"
    )
    found = {path.name for path in HERE.rglob("*.py") if starts.search(path.read_text())}
    # The second holds a script that stands for a launcher.
    assert found == {"processes.py", "test_processes.py", Path(__file__).name}


def test_long_files_are_those_that_there_are():
    assert [name for name in LONG_FIRST if not (HERE / name).is_file()] == []
    assert len(set(LONG_FIRST)) == len(LONG_FIRST)


@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda one: one.name)
def test_every_mutation_still_applies(mutation):
    changed = mutations.mutated(mutation, root=mutations.ROOT)
    compile(changed, mutation.file, "exec")  # a mistake in syntax would be noticed by anything
    assert [name for name in mutation.tests if not (mutations.ROOT / name).is_file()] == []


def test_there_are_mutations_enough_of_every_kind():
    assert len({one.name for one in mutations.MUTATIONS}) == len(mutations.MUTATIONS) >= 40


def test_a_mutation_that_does_not_apply_is_refused():
    gone = mutations.Mutation(
        "gone", "t2i/config/run_config.py", "return self.pad_id + 1", "x", "nothing", ()
    )
    moved = mutations.Mutation("moved", "t2i/no_such_room.py", "no such text", "x", "nothing", ())
    many = mutations.Mutation("many", "t2i/config/run_config.py", "class", "x", "nothing", ())
    with pytest.raises(
        ValueError, match=r"gone: t2i/config/run_config\.py has its old text 0 times; expected once:"
    ) as error:
        mutations.mutated(gone, root=mutations.ROOT)
    assert str(error.value).endswith("It stands once in t2i/tokens/vocab.py.")
    with pytest.raises(ValueError, match="moved: .* 0 times"):
        mutations.mutated(moved, root=mutations.ROOT)
    with pytest.raises(ValueError, match="many: .* expected once"):
        mutations.mutated(many, root=mutations.ROOT)
