"""The doctor at work: a look at each log, an alarm once a state, and a stop where that is asked for."""

from accelerate.utils import broadcast_object_list
from tqdm import tqdm
from transformers import TrainerCallback

from trainers.doctor import TOO_SHORT, Diagnosis, diagnose
from trainers.doctor_advice import run_settings


class DoctorCallback(TrainerCallback):
    """
    Diagnoses what a run has logged so far.

    Args:
        config ([`CJepaConfig`] or [`SJeaConfig`]): Of the model that is trained.
        args ([`JepaTrainingArguments`]): How; with `stop_on_collapse` an ill run is saved and stopped.
    """

    def __init__(self, config, args):
        self.config, self.stops = config, args.stop_on_collapse
        self.facts = run_settings(config, args)
        self.diagnosis = Diagnosis(TOO_SHORT)
        self.has_stopped, self._said = False, None

    def examine(self, history: list[dict]) -> dict[str, int]:
        """Diagnoses a log; gives what is logged of it, `collapsed`: 1 of an ill run, else 0."""
        self.diagnosis = diagnose(history, self.facts)
        return {"collapsed": int(self.diagnosis.is_ill)}

    def on_train_begin(self, args, state, control, **kwargs):
        self.facts["warmup_steps"] = args.get_warmup_steps(state.max_steps)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "collapsed" not in (logs or {}):
            return
        if self.diagnosis.is_ill and self.diagnosis.state != self._said and state.is_world_process_zero:
            tqdm.write(f"ALARM: {self.diagnosis}")
        self._said = self.diagnosis.state
        if self.stops:
            # as process 0 has found, whatever the others' last digits
            decision = broadcast_object_list([self.diagnosis.is_ill])[0]
            if decision:
                self.has_stopped = control.should_save = control.should_training_stop = True

    def stop_sentence(self, output_dir: str) -> str:
        """Why the run was stopped, where it is saved, and what to change."""
        step, advice = self.diagnosis.step, ", or ".join(self.diagnosis.advice)
        return (
            f"Stopped at step {step}: {self.diagnosis.state}: {'; '.join(self.diagnosis.sentences())}. To change: "
            f"{advice}. checkpoint-{step} in {output_dir} is saved; begin anew, or go on from one before that."
        )
