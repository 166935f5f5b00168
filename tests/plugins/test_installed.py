"""The search for packs by hand finds what importlib_metadata finds, whatever is installed."""

from __future__ import annotations

import os
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from pathlib import Path

import importlib_metadata
import pytest
from fake_packs import Site, run_python
from hypothesis import example, given
from hypothesis import strategies as st
from packaging.requirements import Requirement

from kasmina_core import PackState, list_packs
from kasmina_core.packs import compatibility
from kasmina_core.packs.compatibility import Environment, UnreadableRequirementError
from kasmina_core.packs.scanning import Found, scan_packs
from kasmina_core.packs.switches import Switches


class ForeignFinder(MetaPathFinder):
    """Finds given distributions; where it stands, packs are found by importlib_metadata alone."""

    def __init__(self, *found: importlib_metadata.Distribution) -> None:
        self.found = found

    def find_distributions(self, context: object) -> Iterable[importlib_metadata.Distribution]:
        return self.found


@contextmanager
def search_path(*paths: str) -> Iterator[None]:
    before, sys.path[:] = list(sys.path), paths
    try:
        yield
    finally:
        sys.path[:] = before


def both_ways() -> tuple[list[Found], list[Found]]:
    by_hand = scan_packs(Switches())
    sys.meta_path.append(finder := ForeignFinder())
    try:
        return by_hand, scan_packs(Switches())
    finally:
        sys.meta_path.remove(finder)


FOLDERS = (
    *(f"fake{number}-1.0.dist-info" for number in range(8)),
    "fake_a-1.0.dist-info",
    "Fake.A-2.0.dist-info",
    "fake_b.dist-info",
    "fake_b-1.0-x.dist-info",
    "Fake_B-1.0.DIST-INFO",
    "fake_c-1.0.egg-info",
    "~ake_a-1.0.dist-info",
    "-1.0.dist-info",
    ".dist-info",
    "_x-1.0.dist-info",
    "f\xe4ke-1.0.dist-info",
)
HEADERS = (
    "Metadata-Version: 2.1",
    "Name: fake1",
    "name:\tfake-b ",
    "Name: Fake.C",
    "Name:",
    "Version: 1.0",
    "VERSION:  2.0 ",
    "Version: 1.0\n  folded",
    "Summary: f\xe4ke \u2028 \x0c line",
    "License: one\n        two",
    "Requires-Dist: torch>=2",
    "Requires-Dist: fake-a >= 1.0",
    "requires-dist: not a requirement !!",
    "Requires-Dist: nothing>=3; extra == 'test'",
    "Requires-Dist: nothing>=3 ; python_version < '3'",
    "Requires-Python: >=3.11",
    "Requires-Python: >=99",
    "Requires-Python: what",
    "Content-Type: multipart/mixed; boundary=x",
    "no colon",
    "From me",
    ": no name",
    " Version: 3",
    "",
    "Description",
)
ENTRIES = (
    "[kasmina.plugins]",
    " [kasmina.plugins] ",
    "[kasmina.api]",
    "[console_scripts]",
    "[[kasmina.plugins]]",
    "one = fake_one",
    "two=fake_two:plugin # said",
    "one = fake_other",
    "Shouting = fake",
    "cnn = fake",
    "one = v1",
    "one = v9",
    "= v1",
    "one =",
    "no value",
    "# kasmina.plugins = x",
    "a = b = c\x0cd = e",
    "\ufefff\xe4ke = x",
    "",
)


def texts(lines: Iterable[str], most: int) -> st.SearchStrategy[bytes | None]:
    return st.one_of(
        st.none(),
        st.builds(
            lambda chosen, end, encoding, tail: (end.join(chosen) + tail).encode(encoding),
            st.lists(st.sampled_from(list(lines)), max_size=most),
            st.sampled_from(["\n", "\n", "\n", "\r\n", "\r"]),
            st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-16"]),
            st.sampled_from(["", "\n", "\n\nbody\n"]),
        ),
        st.just(b"[kasmina.plugins]\none = fake_one\n\xff"),
        st.just(b"Name: fake-a\nVersion: 1.0\n\n\xff"),
    )


def lines_after(start: Iterable[str], lines: Iterable[str]) -> st.SearchStrategy[bytes | None]:
    chosen = st.lists(st.sampled_from(list(lines)), max_size=3)
    return chosen.map(lambda more: "\n".join([*start, *more, ""]).encode())


def mostly(
    usual: st.SearchStrategy[bytes | None], other: st.SearchStrategy[bytes | None]
) -> st.SearchStrategy[bytes | None]:
    return st.sampled_from([usual] * 5 + [other]).flatmap(lambda kind: kind)


FILES = st.fixed_dictionaries(
    {
        "METADATA": mostly(lines_after(["Name: OWN", "Version: 1.0"], HEADERS), texts(HEADERS, 8)),
        "entry_points.txt": mostly(
            lines_after(["[kasmina.plugins]", "one = fake_one"], ENTRIES), texts(ENTRIES, 6)
        ),
        "requires.txt": st.sampled_from([None, None, None, b"torch>=2\n", b"nothing>=3\n"]),
        "PKG-INFO": st.sampled_from([None, None, None, b"Name: fake-b\nVersion: 3.0\n"]),
    }
)


@given(
    st.lists(
        st.dictionaries(st.sampled_from(FOLDERS), FILES, min_size=2, max_size=8), min_size=1, max_size=2
    ),
    st.sampled_from(["", "twice", "relative", "here"]),
)
def test_the_records_are_those_of_importlib_metadata(
    roots: list[dict[str, dict[str, bytes | None]]], path: str
) -> None:
    with tempfile.TemporaryDirectory() as home, pytest.MonkeyPatch.context() as patched:
        places = []
        for number, folders in enumerate(roots):
            places.append(Path(home, f"site{number}"))
            for folder, files in folders.items():
                (places[-1] / folder).mkdir(parents=True)
                for name, content in files.items():
                    if content is not None:
                        own = folder.partition("-")[0].removesuffix(".dist-info")
                        (places[-1] / folder / name).write_bytes(content.replace(b"OWN", own.encode()))
        paths = [str(place) for place in places]
        if path == "twice":
            paths += paths
        elif path == "relative":
            patched.chdir(home)
            paths = [os.path.basename(place) for place in paths]
        elif path == "here" and places[0].exists():
            patched.chdir(places[0])
            paths[0] = ""
        with search_path(*paths):
            by_hand, by_library = both_ways()
    assert by_hand == by_library


def test_what_is_installed_here_is_found_alike() -> None:
    by_hand, by_library = both_ways()
    assert by_hand == by_library
    assert {record.name for record, _ in by_hand} >= {"cnn", "transformer"}


def test_packs_are_listed_without_parsing_mail_or_requirements(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.install("fake-good", "good = fake_good")
    done = run_python(
        "import sys, kasmina_core\n"
        "records = kasmina_core.list_packs()\n"
        "print([r.state.value for r in records if r.name == 'good'])\n"
        "print([m for m in ('email.parser', 'packaging.requirements') if m in sys.modules])",
        site.root,
    )
    assert done.stdout.splitlines() == ["['discovered']", "[]"], done.stderr


def test_a_pack_that_is_installed_or_removed_meanwhile_is_seen_at_once(site: Site) -> None:
    assert site.mine(list_packs()) == []
    info = site.install("fake-late", "late = fake_late")
    assert [r.name for r in site.mine(list_packs())] == ["late"]
    (info / "entry_points.txt").unlink()
    assert site.mine(list_packs()) == []


def test_a_pack_in_an_archive_is_found(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(site.root / "packs.zip", "w") as archive:
        archive.writestr("fake_zipped-1.0.dist-info/METADATA", "Name: fake-zipped\nVersion: 1.0\n")
        archive.writestr("fake_zipped-1.0.dist-info/entry_points.txt", "[kasmina.plugins]\nzipped = fake\n")
    monkeypatch.syspath_prepend(str(site.root / "packs.zip"))
    assert ("zipped", PackState.DISCOVERED) in [(r.name, r.state) for r in list_packs()]


def test_a_pack_of_an_egg_is_found(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    info = site.root / "fake_laid-1.0.egg" / "EGG-INFO"
    info.mkdir(parents=True)
    (info / "PKG-INFO").write_text("Name: fake-laid\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kasmina.plugins]\nlaid = fake\n")
    monkeypatch.syspath_prepend(str(info.parent))
    assert ("laid", PackState.DISCOVERED) in [(r.name, r.state) for r in list_packs()]


def test_a_pack_of_a_foreign_finder_is_found(
    site: Site, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = Site(tmp_path_factory.mktemp("elsewhere"))
    info = elsewhere.install("fake-far", "far = fake_far")
    finder = ForeignFinder(importlib_metadata.Distribution.at(info))
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, finder])
    assert [r.name for r in elsewhere.mine(list_packs())] == ["far"]


# -- requirements ---------------------------------------------------------------------------------------------------

VERSIONS = (
    "1",
    "1.0",
    "1.0.0",
    "1.0.1",
    "2.0",
    "1.10",
    "1.0.post1",
    "1.0+cpu",
    "1.0.dev1",
    "2.0rc1",
    "1!1.0",
    "x",
    "",
)
SPECIFIERS = st.lists(
    st.builds(
        "".join,
        st.tuples(
            st.sampled_from([">=", "<=", "==", "!=", "<", ">", "~=", "===", "=", ""]),
            st.sampled_from(["", " ", "  "]),
            st.sampled_from([*VERSIONS, "1.*", "0"]),
        ),
    ),
    max_size=3,
)


@given(
    st.sampled_from(["fake", "Fa.ke", "fake-", "fake[x]", "fake "]),
    SPECIFIERS,
    st.sampled_from([",", ", ", " ", ""]),
    st.sampled_from(
        ["", ";extra == 'a'", ' ; extra == "b"', "; extra != 'a'", "; python_version > '3'", " x"]
    ),
    st.sampled_from(VERSIONS),
)
@example("fake", [">=1"], ",", "", "1.0+cpu")
@example("fake", [">1.0"], ",", "", "1.0+cpu")
@example("fake", [">1.0"], ",", "", "1.0.post1")
@example("fake", ["<1.0.post1"], ",", "", "1.0")
@example("fake", [">=1", "x"], ",", ";extra == 'a'", "1.0")
def test_a_requirement_gets_the_verdict_of_packaging(
    name: str, specifiers: list[str], comma: str, marker: str, installed: str
) -> None:
    def verdict(text: str, python: str) -> str | None:
        try:
            return Environment(lambda name: installed).requirement_problem("'it 1.0'", [text], python)
        except UnreadableRequirementError as error:
            return f"unreadable: {error}"

    text, python = f"{name}{comma.join(specifiers)}{marker}", comma.join(specifiers)
    by_hand = verdict(text, python)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(compatibility, "_plain", lambda text: (None, ""))
        patched.setattr(compatibility, "_plainly_contains", lambda specifier, version: False)
        by_packaging = verdict(text, python)
    assert by_hand == by_packaging
    if by_hand is None and installed == "1.0" and not marker:
        assert Requirement(text).specifier.contains("1.0")
