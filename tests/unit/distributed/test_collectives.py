"""On a GPU the default group is NCCL's: it refuses tensors of the host, ends after half an hour, and would rebuild what
an object holds of a GPU on GPU 0. Flags, objects and waits belong to the control group."""

from __future__ import annotations

import ast
from pathlib import Path

import ssgen_ds

PACKAGE = Path(ssgen_ds.__file__).parent
COLLECTIVES = frozenset(
    """all_gather all_gather_into_tensor all_gather_object all_reduce all_to_all barrier broadcast broadcast_object_list
    gather gather_object monitored_barrier reduce reduce_scatter scatter scatter_object_list""".split()  # noqa: SIM905
)
# Tensors of the device, as many bytes as a model's buffers have: what the default group is for.
ON_THE_DEFAULT_GROUP = {("modeling/zero3.py", "broadcast")}


def collectives(file: Path) -> list[tuple[str, bool]]:
    """Each collective that a file makes through torch.distributed, and whether it names a group."""
    found = []
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in COLLECTIVES:
            owner = node.func.value
            if isinstance(owner, ast.Name) and owner.id == "dist":
                found.append((node.func.attr, any(keyword.arg == "group" for keyword in node.keywords)))
    return found


def test_only_tensors_of_the_device_go_through_the_default_group():
    made = {(str(file.relative_to(PACKAGE)), *one) for file in PACKAGE.rglob("*.py") for one in collectives(file)}
    assert len(made) > 5, "else this looks at nothing"
    assert {(file, name) for file, name, has_group in made if not has_group} == ON_THE_DEFAULT_GROUP


def test_nothing_else_of_torch_distributed_is_imported_by_its_name():
    """So that the test above sees every collective."""
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.distributed"):
                assert not {alias.name for alias in node.names} & COLLECTIVES, file
