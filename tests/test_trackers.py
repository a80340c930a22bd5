"""Trackers that fail do not end a run: one that always raises, and TensorBoard where it cannot write."""

import logging
import shutil

import pytest
from training_worker import build_trainer
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from trainers.errors import InputError
from trainers.trackers import guard_trackers, is_tracker

EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]
TRAINING = {"max_steps": 5, "per_device_train_batch_size": 8}


class Down(TensorBoardCallback):
    """Raises at each event from a number of calls on, and counts the calls of each."""

    def __init__(self, error: Exception, num_good: int = 0):
        self.error, self.num_good, self.calls = error, num_good, {}


def failing(event: str):
    def call(self, args, state, control, **kwargs):
        self.calls[event] = self.calls.get(event, 0) + 1
        if self.calls[event] > self.num_good:
            raise self.error

    return call


for name in EVENTS:
    setattr(Down, name, failing(name))
    getattr(Down, name).__name__ = name


def with_tracker(trainer, tracker):
    """The trainer as if it had been given the tracker among its callbacks."""
    guard_trackers([tracker])
    trainer.add_callback(tracker)
    return trainer


def test_a_tracker_that_always_raises_is_left_out(tmp_path, caplog):
    tracker = Down(ConnectionError("no route to host\nand more"))
    trainer = with_tracker(build_trainer(str(tmp_path), TRAINING), tracker)
    trainer.train()
    assert trainer.state.global_step == 5
    # the first event to fail a third time in a row is the beginning of the third step
    assert tracker.calls["on_step_begin"] == 3 and tracker.calls["on_train_begin"] == 1
    assert tracker.calls["on_step_end"] == 2 and "on_train_end" not in tracker.calls
    said = [record.getMessage() for record in caplog.records if "tracker Down" in record.getMessage()]
    reason = "(ConnectionError: no route to host)"
    assert said[0] == (
        f"The tracker Down failed in on_train_begin at step 0 {reason}: training goes on, and the figures that it "
        "misses are lost to it."
    )
    assert said[-1] == (
        f"The tracker Down failed in on_step_begin at step 2 {reason}, 3 times in a row: it is left out, and its "
        "later figures are lost."
    )
    assert len(said) == len(tracker.calls) + 1


def test_a_tracker_that_recovers_stays(tmp_path, caplog):
    class Flaky(TensorBoardCallback):
        steps, on_train_begin, on_train_end = [], TrainerCallback.on_train_begin, TrainerCallback.on_train_end

        def on_log(self, args, state, control, logs=None, **kwargs):
            if state.global_step % 3:
                raise OSError("busy")
            self.steps.append(state.global_step)

    trainer = with_tracker(build_trainer(str(tmp_path), TRAINING | {"max_steps": 9}), Flaky())
    trainer.train()
    assert Flaky.steps == [3, 6, 9, 9]  # the last is the summary of the training
    assert sum("tracker Flaky" in record.getMessage() for record in caplog.records) == 3


def test_errors_of_ours_and_interruptions_pass(tmp_path):
    for error in (InputError("stop"), KeyboardInterrupt()):
        trainer = with_tracker(build_trainer(str(tmp_path), TRAINING), Down(error))
        with pytest.raises(type(error)):
            trainer.train()


def test_what_a_tracker_is(tmp_path):
    trainer = build_trainer(str(tmp_path), TRAINING | {"report_to": "tensorboard"})
    callbacks = trainer.callback_handler.callbacks
    assert [type(callback) for callback in callbacks if is_tracker(callback)] == [TensorBoardCallback]
    assert is_tracker(Down(OSError())) and not is_tracker(TrainerCallback()) and len(callbacks) > 4
    assert isinstance(trainer.pop_callback(TensorBoardCallback), TensorBoardCallback)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard writes in a thread
@pytest.mark.parametrize("when", ["before", "during"])
def test_tensorboard_that_cannot_write(tmp_path, monkeypatch, caplog, when):
    board = tmp_path / "board"
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(board))

    class Replace(TrainerCallback):
        """Puts a file where the folder of the board was."""

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                shutil.rmtree(board)
                board.write_text("a file")

    if when == "before":
        board.write_text("a file")
    trainer = build_trainer(str(tmp_path / "run"), TRAINING | {"max_steps": 8, "report_to": "tensorboard"})
    if when == "during":
        trainer.add_callback(Replace)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == 8
    said = [record.getMessage() for record in caplog.records if "tracker TensorBoardCallback" in record.getMessage()]
    for words, step in zip(said, (0, 1, 3) if when == "before" else (2, 4), strict=True):
        assert f"at step {step} (" in words
    assert said[-1].endswith("3 times in a row: it is left out, and its later figures are lost.")


def test_tensorboard_is_still_written_to(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = build_trainer(str(tmp_path / "run"), TRAINING | {"report_to": "tensorboard"})
    trainer.train()
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [event.value for event in board.Scalars("train/loss")] == pytest.approx(logged)
