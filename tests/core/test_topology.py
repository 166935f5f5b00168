"""Topologies: what each says of its axes, names that are looked up, and objects that stay the same."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys

import pytest
import torch

from kasmina_core import KasminaError, Topology, TopologyError

CNN, TRANSFORMER = Topology.CNN, Topology.TRANSFORMER
BUNDLED = [CNN, TRANSFORMER, Topology.VECTOR, Topology.SIGNAL, Topology.VOLUME]
GRAPH = {"value": "graph", "axes": "bnf", "width": "f"}


def test_the_bundled_topologies_say_what_their_axes_mean() -> None:
    facts = {t.value: (str(t), t.ndim, t.feature_dim, t.sequence_axis, t.causal_axis) for t in BUNDLED}
    assert facts == {
        "cnn": ("(b, c, h, w)", 4, 1, None, None),
        "transformer": ("(b, t, d)", 3, -1, 1, 1),
        "vector": ("(b, d)", 2, -1, None, None),
        "signal": ("(b, c, t)", 3, 1, None, 2),
        "volume": ("(b, c, d, h, w)", 5, 1, None, None),
    }
    assert [t for t in BUNDLED if t.can_be_causal] == [TRANSFORMER, Topology.SIGNAL]
    assert [t for t in BUNDLED if not t.detach_input_in_blending] == [TRANSFORMER]
    assert list(Topology)[:5] == BUNDLED


def test_a_topology_is_found_by_name_whatever_the_case() -> None:
    assert Topology("cnn") is Topology("CNN") is Topology(CNN) is CNN
    assert all(Topology(t.value) is t for t in BUNDLED)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (
            "transfromer",
            "'transfromer' is not a topology. Did you mean 'transformer'? Valid: cnn, transformer, vector,",
        ),
        ("rnn-like-thing", "Valid: cnn, transformer, vector, signal, volume"),
        (3, "3 is not a topology."),
        (None, "None is not a topology."),
    ],
)
def test_a_wrong_name_raises_with_the_valid_ones(wrong: object, says: str) -> None:
    with pytest.raises(TopologyError, match=re.escape(says)) as caught:
        Topology(wrong)
    assert isinstance(caught.value, KasminaError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("topology", [*BUNDLED, Topology.declare("own", "bxfy", width="f")])
def test_copies_and_pickles_are_the_object_itself(topology: Topology) -> None:
    assert copy.copy(topology) is copy.deepcopy(topology) is topology
    assert pickle.loads(pickle.dumps(topology)) is topology


def test_a_topology_cannot_be_changed() -> None:
    with pytest.raises(AttributeError, match="cannot be changed"):
        CNN.width = "h"
    with pytest.raises(AttributeError, match="cannot be changed"):
        del CNN.axes


def test_an_equal_declaration_is_the_same_object_and_adds_no_name() -> None:
    assert Topology.declare(**GRAPH) is Topology.declare(**GRAPH)
    assert Topology.declare(**GRAPH) is not Topology.declare(**GRAPH, sequence="n")
    with pytest.raises(TopologyError, match="'graph' is not a topology"):
        Topology("graph")


def test_a_pickle_is_read_where_nobody_declared_its_topology() -> None:
    written = pickle.dumps(Topology.declare(**GRAPH))
    read = f"import pickle; t = pickle.loads({written!r}); print(t.value, t, t.width)"
    done = subprocess.run([sys.executable, "-c", read], capture_output=True, text=True, check=True)
    assert done.stdout == "graph (b, n, f) f\n"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"value": "Graph"}, "its name must be of lower case letters"),
        ({"axes": "nbf"}, "'b' for the batch first"),
        ({"axes": "bff"}, "axes must be different lower case letters"),
        ({"axes": "b"}, "axes must be different lower case letters"),
        ({"axes": ["b", "nodes", "f"]}, "axes must be different lower case letters"),
        ({"width": "b"}, "width must be one of its axes n, f, not 'b'"),
        ({"sequence": "t"}, "sequence must be one of its axes n, f, not 't'"),
        ({"causal": "f"}, "the width 'f' has no positions"),
        ({"examples": [(2, 3), (2,)]}, "examples must be two or more, each with the sizes of b, n"),
        ({"examples": [(2, 3)]}, "examples must be two or more"),
        ({"memory_formats": [torch.channels_last]}, "memory_formats must be names"),
    ],
)
def test_a_row_that_cannot_be_used_is_refused_with_the_reason(changes: dict[str, object], says: str) -> None:
    with pytest.raises(TopologyError, match=re.escape(says)):
        Topology.declare(**GRAPH | changes)


@pytest.mark.parametrize("topology", [*BUNDLED, Topology.declare("five", "bvwfxyz", width="f")])
def test_examples_have_the_width_in_its_place_and_several_values_to_train_on(topology: Topology) -> None:
    shapes = topology.example_shapes(7)
    assert all(len(shape) == topology.ndim and shape[topology.feature_dim] == 7 for shape in shapes)
    assert all(torch.Size(shape).numel() > 7 for shape in shapes[:-1])


def test_an_order_brings_a_layout_into_the_topologys_own() -> None:
    held = torch.zeros(2, 5, 7, 3)  # (b, h, w, c)
    assert held.permute(CNN.order("bhwc")).shape == (2, 3, 5, 7)
    assert CNN.order(CNN.layout) == (0, 1, 2, 3)
    with pytest.raises(TopologyError, match=r"'bhw' is not a layout of cnn: .*'bchw'"):
        CNN.order("bhw")
