"""What a run shows: plain lines, the live table, the final tables and the summary."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re

import pytest
from fake_runs import fake_run
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from kasmina_core.experiments import wording
from kasmina_core.experiments.display import RunDisplay, epoch_parts, folded, print_final
from kasmina_core.experiments.record import GROWN, HOST_ALONE, ArmResult, EpochRecord, EpochSlot, RunRecord
from kasmina_core.experiments.report import render_html
from kasmina_core.verdicts import Finding

HOSTILE = "[bold red]x[/]\x1b]52;c;x\x07\r\n$y_"


def console(terminal=False, width=200):
    return Console(
        file=io.StringIO(),
        force_terminal=terminal,
        width=width,
        color_system="standard" if terminal else None,
    )


def shown(display_console):
    return display_console.file.getvalue()


def final_text(record, width):
    out = console(width=width)
    print_final(record, out)
    return shown(out)


def test_without_a_terminal_each_epoch_is_one_plain_line():
    out, run = console(width=400), fake_run()
    with RunDisplay(40, console=out, metric_name="accuracy") as display:
        assert not display.is_live
        display.phase("growing", 40)
        for epoch in run.epochs:
            display.epoch(epoch)
    lines = shown(out).splitlines()
    assert lines[0] == "growing"
    assert [line.split("|")[0].strip() for line in lines[1:]] == [f"epoch {i:>2}/40" for i in range(1, 41)]
    assert "\x1b" not in shown(out)
    assert lines[14].endswith(
        "accuracy 77.1 % | block1 blending kasmina-cnn:conv_small alpha 0.40 gain +0.0600"
        " | block2 training kasmina-cnn:norm alpha 0.00 gain +0.0200"
    )
    assert "parameters 1,514" in lines[11]
    assert [line.count("parameters") for line in lines[1:]] == [
        int(epoch.parameters != before)
        for before, epoch in zip([0, *(e.parameters for e in run.epochs)], run.epochs, strict=False)
    ]
    assert lines[17].endswith("| gate G2 block2: failed, gain -0.0040 is not above 0.02")


@pytest.mark.parametrize("width", [40, 80, 120])
def test_lines_are_as_wide_as_the_screen_and_fold_between_figures(width):
    out, run = console(width=width), fake_run()
    with RunDisplay(40, console=out, metric_name="accuracy") as display:
        for epoch in run.epochs:
            display.epoch(epoch)
    lines = shown(out).splitlines()
    assert max(map(len, lines)) <= width
    assert [line[:11] for line in lines if not line.startswith("  ")] == [
        f"epoch {i:>2}/40" for i in range(1, 41)
    ]
    assert "…" not in shown(out)
    assert (width == 120) != ("\n  gate G2 block2: failed" in shown(out))


def test_a_fossil_is_told_once():
    out = console()
    with RunDisplay(40, console=out, metric_name="accuracy") as display:
        for epoch in fake_run().epochs:
            display.epoch(epoch)
    assert shown(out).count("block1 fossilized") == shown(out).count("block2 fossilized") == 1


def test_quiet_prints_plain_lines_even_on_a_terminal():
    out = console(terminal=True)
    with RunDisplay(1, quiet=True, console=out) as display:
        display.epoch(fake_run().epochs[0])
    assert shown(out).count("\n") == 1
    assert "\x1b" not in shown(out)


def test_progress_goes_to_standard_error(capsys):
    with RunDisplay(1, enabled=False) as display:
        display.phase("growing", 1)
        display.epoch(fake_run().epochs[0])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "epoch 1/1" in captured.err


def test_a_long_run_prints_some_epochs_and_every_change_of_stage():
    out = console()
    slot = EpochSlot("s", "DORMANT")
    with RunDisplay(1000, console=out) as display:
        for i in range(1, 1001):
            stage = "TRAINING" if i >= 555 else "DORMANT"
            display.epoch(EpochRecord(i, 1.0, 1.0, 0.5, 10, 1.0, (dataclasses.replace(slot, stage=stage),)))
    printed = [int(number) for number in re.findall(r"epoch +(\d+)/1000", shown(out))]
    assert printed == sorted({1, 555, *range(10, 1001, 10)})


def test_a_phase_without_epochs_tells_its_quarters():
    out = console()
    with RunDisplay(1, console=out) as display:
        display.phase("host alone", 1e9)
        for _ in range(10):
            display.advance(1e8)
        display.phase("measuring")
        display.advance(3)
    assert shown(out).splitlines() == [
        "host alone",
        "host alone: 25 %",
        "host alone: 50 %",
        "host alone: 75 %",
        "host alone: 100 %",
        "measuring",
    ]


def test_the_live_table_shows_epochs_slots_and_the_last_gate():
    out = console(terminal=True, width=120)
    with RunDisplay(40, console=out, metric_name="accuracy") as display:
        assert display.is_live
        display.phase("growing", 40)
        for epoch in fake_run().epochs[:28]:
            display.epoch(epoch)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown(out))
    last = text[text.rindex("growing") :]
    for part in ("70%", "28/40", "87.3 %", "1,514", "blending", "██░░░░░░░░ 0.25", "+0.0450", "dormant"):
        assert part in last
    assert "last gate  G2 block2: failed" in last


@pytest.mark.parametrize("width", [20, 40, 80])
def test_the_live_table_is_no_wider_than_the_terminal(width):
    out = console(terminal=True, width=width)
    with RunDisplay(40, console=out, metric_name="accuracy") as display:
        display.phase("growing the host on digits", 40)
        for epoch in fake_run().epochs[:28]:
            display.epoch(epoch)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown(out))
    assert max(cell_len(line) for line in text.replace("\r", "\n").split("\n")) <= width


def test_no_color_takes_the_colours(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    out = Console(file=io.StringIO(), force_terminal=True, width=120, color_system="standard")
    with RunDisplay(40, console=out, metric_name="accuracy") as display:
        for epoch in fake_run().epochs[:28]:
            display.epoch(epoch)
    print_final(fake_run(), out)
    codes = {code for codes in re.findall(r"\x1b\[([0-9;]*)m", shown(out)) for code in codes.split(";")}
    assert codes <= {"", "0", "1", "2", "3"}  # bold, dim and italic are no colours


def test_names_are_shown_as_they_are_and_control_nothing():
    slot = EpochSlot(HOSTILE, "TRAINING", HOSTILE, 0.5, 0.1)
    record = EpochRecord(1, math.nan, math.inf, 0.5, 10, 1.0, (slot,), HOSTILE)
    for terminal in (False, True):
        out = console(terminal=terminal)
        with RunDisplay(1, console=out) as display:
            display.phase(HOSTILE, 1)
            display.epoch(record)
        assert "[bold red]x[/]" in shown(out)
        assert "\x1b]52" not in shown(out)
    assert "train loss not a number" in epoch_parts(record, 1, "accuracy")


@given(name=st.text(), stage=st.text(), reason=st.text())
def test_no_text_makes_a_line_unprintable_or_wider_than_the_screen(name, stage, reason):
    slot = EpochSlot(name, stage, name, 0.5, None)
    parts = epoch_parts(EpochRecord(1, 1.0, 1.0, 0.5, 10, 1.0, (slot,), reason), 1, "accuracy")
    for line in folded(parts, 60).split("\n"):
        assert line.isprintable()
        assert cell_len(line) <= 60


def test_final_text_holds_the_arms_and_every_seed_at_any_width_without_escape_codes():
    run = fake_run()
    for width in (60, 80, 120, 200):
        text = final_text(run, width)
        assert "\x1b" not in text
        assert max(map(len, text.splitlines())) <= width
        for part in (GROWN, HOST_ALONE, "2,102", "0.2190", "93.5 %"):
            assert part in text
        flat = " ".join(text.split())
        for seed in run.seeds:
            assert seed.seed_id in flat
            assert seed.blueprint in flat
            assert seed.outcome in flat
        assert "+0.1210 [0.0940, 0.1480]" in flat
        assert "-0.0040 [-0.0110, 0.0030] may be 0" in flat
        assert "never measured" in flat
        assert "no gain after six epochs" in flat


def test_print_final_has_the_notes():
    out, run = console(), fake_run()
    run.notes.append("The gates decided on 200 samples.")
    print_final(run, out)
    assert "Note: The gates decided on 200 samples." in shown(out)


def test_the_verdict_says_if_the_host_alone_does_better_than_what_grew():
    run = fake_run()
    run.verdict = "Of 4 seeds 2 stayed."
    assert wording.growth(run) == run.verdict
    run.arms = [dataclasses.replace(run.arms[0], test_loss=0.6), run.arms[1]]
    assert wording.growth(run).startswith("Of 4 seeds 2 stayed. All the same growth was a loss here")
    assert "0.076 lower" in wording.growth(run)
    run.seeds = run.seeds[1:2]
    assert wording.growth(run) == run.verdict


def test_parameters_of_seeds_that_are_not_in_the_output_are_told():
    run = fake_run()
    assert "588 of them of seeds that are not in its output" in wording.summary(run)
    run.seeds.pop()
    assert "of them" not in wording.summary(run)


def test_both_gains_of_a_seed_are_shown_that_of_its_gate_first():
    run = fake_run()
    finding = Finding(1.0, 0.2, 0.1, 0.12, 0.28, 200, 0.001, 3, 0.01, 0.02, 0.05)
    run.seeds[0] = dataclasses.replace(run.seeds[0], finding={"gate": "G5"} | finding.to_dict())
    unbounded = dataclasses.replace(finding, low=-math.inf, high=math.inf)
    run.seeds[1] = dataclasses.replace(
        run.seeds[1],
        gain_low=-math.inf,
        gain_high=math.inf,
        samples=12,
        finding={"gate": "G2"} | unbounded.to_dict(),
    )
    again = RunRecord.from_dict(json.loads(run.to_json()))
    for width in (80, 300):
        out = console(width=width)
        print_final(again, out)
        flat = " ".join(shown(out).split())
        before, after = flat.index("G5: +0.2000 [0.1200, 0.2800], n = 200"), flat.index("+0.1210 [0.0940")
        assert before < after
        assert "G2: +0.2000, n = 200; too few differ to bound it" in flat
        assert "-0.0040, n = 12; too few differ to bound it" in flat
        assert "inf" not in flat
        assert "on its own samples" in flat
        assert "on the test samples" in flat


def test_a_seed_that_makes_the_model_worse_is_told_in_red():
    run = fake_run()
    run.verdict = "Of 4 seeds 2 stayed."
    assert wording.harms(run) == []
    run.seeds[0] = dataclasses.replace(run.seeds[0], gain=-0.2, gain_low=-0.3, gain_high=-0.1)
    culled = dataclasses.replace(run.seeds[1], gain=-0.2, gain_low=-0.3, gain_high=-0.1)
    run.seeds[1] = culled
    apart = dataclasses.replace(run.seeds[3], stages=[("GERMINATED", 31), ("TRAINING", 32)])
    run.seeds[3] = dataclasses.replace(
        apart, gain=-0.2, gain_low=-0.3, gain_high=-0.1
    )  # not in the output yet
    said = (
        "seed-1 (kasmina-cnn:conv_small) is in the model and makes its test loss worse: "
        "contribution -0.2000 [-0.3000, -0.1000]."
    )
    assert wording.harms(run) == [said]
    for width in (80, 250):
        out = console(terminal=True, width=width)
        print_final(run, out)
        red = " ".join(re.findall(r"\x1b\[31m(.*?)\x1b\[0m", shown(out)))
        assert said in " ".join(red.split())
        assert "seed-2" not in red
        assert "Growth: Of 4 seeds 2 stayed." in shown(out)


def test_a_grown_model_that_is_worse_is_summed_up_in_red():
    for losses, is_worse in (((0.6, 0.5), True), ((0.5, 0.6), False), ((0.501, 0.5), False)):
        run = run_of((losses[0], 0.8), (losses[1], 0.8))
        out = console(terminal=True)
        print_final(run, out)
        assert ("\x1b[31mAt equal" in shown(out)) == is_worse
        assert ('class="summary harm"' in render_html(run, b"")) == is_worse


# The summary


def run_of(grown, alone, **changes):
    """A run with these (test loss, accuracy) pairs and equal FLOPs."""
    run = fake_run()
    run.arms = [ArmResult(GROWN, 2102, 1e9, 40, 0.2, *grown, 1.0)]
    if alone is not None:
        run.arms.append(ArmResult(HOST_ALONE, 338, 1e9, 70, 0.2, *alone, 1.0))
    for name, value in changes.items():
        setattr(run, name, value)
    return run


def count_sentences(run):
    return len(re.findall(r"\.(?= [A-Z0-9]|$)", wording.summary(run)))


def test_a_better_grown_model_is_called_better_by_as_much_as_it_is():
    text = wording.summary(run_of((0.219, 0.935), (0.524, 0.841)))
    assert "At equal training FLOPs, the grown model is better than the host alone" in text
    assert "0.305 lower (0.2190 against 0.5240; accuracy 93.5 % against 84.1 %)" in text
    assert "2 of 4 seeds were kept" in text
    assert "6.22 times the host's parameters" in text
    assert "chance" in text


def test_a_worse_grown_model_is_called_worse():
    text = wording.summary(run_of((0.6, 0.80), (0.5, 0.84)))
    assert "worse than the host alone: its test loss is 0.1 higher" in text
    assert "better" not in text


def test_a_difference_under_one_per_cent_is_no_difference():
    text = wording.summary(run_of((0.502, 0.84), (0.5, 0.84)))
    assert "the same test loss within 1%" in text
    assert "better" not in text
    assert "worse" not in text


def test_loss_and_metric_that_disagree_are_said_to_disagree():
    text = wording.summary(run_of((0.4, 0.80), (0.5, 0.84)))
    assert "the figures disagree" in text
    assert "accuracy is worse" in text
    bits = run_of((0.4, 0.6), (0.5, 0.7), metric_name="bits per character", higher_is_better=False)
    assert "is better than the host alone" in wording.summary(bits)


def test_unequal_flops_are_called_unfair():
    run = run_of((0.2, 0.9), (0.5, 0.8))
    run.arms[1] = dataclasses.replace(run.arms[1], flops=0.5e9)
    assert "unequal training FLOPs (grown 1.00 G, host alone 500 M)" in wording.summary(run)


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (run_of((0.2, 0.9), None), "nothing to compare it with"),
        (run_of((math.nan, 0.1), (0.5, 0.8)), "cannot be compared: grown not a number"),
        (run_of((0.2, 0.9), (0.5, 0.8), seeds=[]), "nothing of this comes from growth"),
        (run_of((0.2, 0.9), (0.5, 0.8), interrupted=True), "stopped before its end: at equal"),
        (RunRecord("digits", "accuracy", "h"), "Nothing can be said"),
    ],
)
def test_the_summary_is_two_sentences_that_claim_no_more_than_was_measured(run, said):
    assert said in wording.summary(run)
    assert count_sentences(run) == 2


def test_a_model_no_seed_stayed_in_is_said_to_have_the_size_of_the_host():
    run = run_of((0.51, 0.8), (0.5, 0.84))
    run.seeds = [run.seeds[1]]
    run.arms[0] = dataclasses.replace(run.arms[0], parameters=338)
    assert "0 of 1 seed was kept, so the grown model has the size of the host" in wording.summary(run)


def test_other_arms_answer_what_a_model_of_that_size_does():
    run = run_of((0.2, 0.9), (0.5, 0.8))
    run.arms.append(ArmResult("large from the start", 2102, 1e9, 20, 0.1, 0.15, 0.95, 1.0))
    assert "from the start" not in wording.summary(run)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00 k"),
        (999_999, "1.00 M"),
        (37.4e9, "37.4 G"),
        (1.234e12, "1.23 T"),
        (math.nan, "unknown"),
    ],
)
def test_flops_have_three_figures_and_a_prefix(value, text):
    assert wording.flops(value) == text


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_the_comparison_is_never_cut_short(width: int) -> None:
    record = fake_run()
    record.metric_name = "bits per character"
    text = final_text(record, width)
    assert "…" not in text
    for word in ("parameters", "training FLOPs", "bits per character"):
        assert word in text
