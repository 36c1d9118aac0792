"""The steps of a run, and what is done after each."""

from mlm_scratch import loop
from mlm_scratch.report.log import Report
from mlm_scratch.run.signals import StopRequest
from mlm_scratch.run.state import Training


def run_steps(t: Training, report: Report, stop: StopRequest) -> None:
    """Run the remaining optimizer steps, or up to the one after which the run is to end.

    Args:
        t: the run in memory.
        report: logs the metrics; that of a rank other than 0 ignores them (report/log.py).
        stop: remembers a stop signal (run/signals.py).
    """
    steps = t.loader.steps(t.steps_done, t.total_steps)
    for done in loop.run_steps(steps, **t.step_arguments()):
        t.steps_done += 1
        t.losses.add(done.loss, done.step.n_masked)
        report.advance(done.step)

        # ---- Once in a while
        if t.steps_done % t.config.output.log_every == 0:
            mean_loss, grad_norm = t.losses.take_mean(), done.grad_norm.item()
            report.log(t.steps_done, mean_loss, done.learning_rate, grad_norm)
        t.losses.stop_if_diverged(t.steps_done, t.total_steps)
        if t.evaluate_and_save(report, stop):
            return
