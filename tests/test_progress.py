"""The clock of a run, and what a checkpoint keeps of its place in the data."""

import pytest

from trainers.errors import InputError
from trainers.progress import Progress, RunClock

# ten steps of 16 images by two processes
BEGUN = Progress(step=10, samples_seen=160, batch_size=16, num_processes=2, schedule_batch_size=16)


def test_schedules_of_a_run_by_epochs_do_not_jump_with_the_batch():
    whole = RunClock(16, total_samples=480)
    assert whole.num_steps() == 30 and whole.place(10, 30) == (10, 30)
    for batch_size, num_steps in ((8, 10 + 40), (16, 30), (32, 10 + 10), (48, 10 + 7)):
        clock = RunClock(batch_size, 480, BEGUN)
        assert clock.num_steps() == num_steps
        assert clock.samples_seen(10) == 160 and clock.place(10, num_steps) == (10, 30)
        # as far after as many images
        assert clock.samples_seen(12) == 160 + 2 * batch_size
        assert clock.place(12, num_steps) == (whole.place(10, 30)[0] + 2 * batch_size / 16, 30)


def test_a_second_change_of_batches_counts_from_the_first():
    clock = RunClock(32, 480, BEGUN)
    again = Progress(step=14, samples_seen=clock.samples_seen(14), batch_size=32, num_processes=1,
                     schedule_batch_size=clock.schedule_batch_size)  # fmt: skip
    assert again.samples_seen == 288 and RunClock(16, 480, again).place(14, 26) == (18, 30)


def test_schedules_of_a_run_of_given_steps_are_of_its_steps():
    clock = RunClock(32, None, BEGUN)
    assert clock.place(12, 40) == (12, 40) and clock.samples_seen(12) == 224


def test_the_last_batch_is_full():
    assert [RunClock(16, total).num_steps() for total in (1, 16, 17)] == [1, 1, 2]


def test_progress_is_read_as_it_was_written(tmp_path):
    progress = Progress(3, 48, 16, 2, 8, num_lanes=4, fingerprint="x", shard_rows={0: 5, 3: 7})
    progress.write(tmp_path)
    assert Progress.read(tmp_path) == progress


@pytest.mark.parametrize("text", ["", "[1]", '{"step": 1}', '{"step": 1, "of": 2}'])
def test_broken_progress_is_refused(tmp_path, text):
    (tmp_path / "progress.json").write_text(text)
    with pytest.raises(InputError, match="progress.json is missing or broken"):
        Progress.read(tmp_path)
