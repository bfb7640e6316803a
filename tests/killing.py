"""A process that dies in the middle of a run, so to say."""


class Killed(Exception):
    pass


def dies_before(task, step):
    """The task, which raises `Killed` before this step's optimizer; None: it stays as it is."""
    if step is None:
        return task
    before = task.before_optimizer

    def die():
        if task.step == step:
            raise Killed
        before()

    task.before_optimizer = die
    return task
