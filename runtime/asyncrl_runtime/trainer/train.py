"""The training loop of rank 0, top to bottom. What each line does is in attempt.py."""

from asyncrl_runtime.trainer.attempt import Attempt


async def train(attempt: Attempt) -> str:
    """Train up to the last step, or until nothing is left to learn; publish a policy version after each.

    A restarted trainer repeats the steps that its ledger holds before it forms new ones: the calls are the
    same, and `next_batch` says which batch it is.

    Returns:
        Where it was told to stop, before the last step; empty if the job is done.
    """
    await attempt.publish_weights()
    await attempt.evaluate_first()

    while attempt.version < attempt.max_steps:
        batch = await attempt.next_batch()  # the oldest groups; waiting is a boundary for weights
        if attempt.has_mastered:
            break
        if batch is None:
            return await attempt.stop()
        await attempt.record(batch)  # the ledger: from here on this step is history
        report = await attempt.train_step(batch)  # proximal log-probs, advantages, minibatches, updates
        if report is None:
            return await attempt.stop_within_step()
        await attempt.advance(batch)  # the new version is offered to every engine, and the gate moves
        attempt.log_metrics(batch, report)  # before the checkpoint, or a crash in between would lose the line
        await attempt.checkpoint_if_due()  # it holds the stream position: nothing else acknowledges
        attempt.evaluate_if_due()  # it runs while training goes on

    await attempt.finish()  # last evaluation, checkpoint, export, and the ledger's end
    return ""
