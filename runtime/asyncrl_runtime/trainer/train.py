"""The training loop of rank 0, top to bottom (design.md section 6). What each line does is in job.py."""

from asyncrl_runtime.trainer.job import TrainerJob


async def train(job: TrainerJob) -> bool:
    """Train up to the last step; publish a policy version after each.

    A restarted trainer repeats the steps that its ledger holds before it forms new ones: the calls are the
    same, and `next_batch` says which batch it is.

    Returns:
        False if it was told to stop before; a checkpoint has been made then.
    """
    await job.publish_weights()
    await job.evaluate_first()

    while job.version < job.max_steps:
        batch = await job.next_batch()  # the oldest groups; waiting is a boundary for weights
        if batch is None:
            await job.stop()
            return False
        job.record(batch)  # the ledger: from here on this step is history
        report = await job.train_step(batch)  # proximal log-probs, advantages, minibatches, updates
        await job.advance(batch)  # the new version is offered to every engine, and the gate moves
        job.log_metrics(batch, report)  # before the checkpoint, or a crash in between would lose the line
        await job.checkpoint_if_due()  # holds the stream position: nothing else acknowledges
        job.evaluate_if_due()  # beside the training that goes on

    await job.finish()  # last evaluation, checkpoint, export, and the ledger's end
    return True
