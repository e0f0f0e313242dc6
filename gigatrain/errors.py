"""Every error a user can cause: each names the value, the limit and the way out, and the CLI prints it without a traceback."""

REQUEUE = 75  # exit code (sysexits.h: EX_TEMPFAIL) of a run that was asked to leave and is saved: start the same command again, with --resume or --continue


class GigatrainError(Exception):
    """Base of the errors that are the user's to mend; `exit_code` is what the CLI leaves with, `shared` an error that all ranks of a run raise,
    `secondary` one that only says that another rank is gone, which knows why, `transient` one whose cause may be gone the next time."""

    exit_code = 1
    shared = False
    secondary = False
    transient = False


class RecipeError(GigatrainError):
    """The recipe or an override of it is wrong: an unknown key, a wrong type, a value out of range."""

    exit_code = 2


class SiteError(GigatrainError):
    """The site is unknown, or lacks a fact that the run needs."""

    exit_code = 3


class PlanError(GigatrainError):
    """Recipe and site are each right but cannot work together."""

    exit_code = 4


class DataError(GigatrainError):
    """A corpus, a tokenizer or a shard is missing, torn or not what the manifest says."""

    exit_code = 5


class CheckpointError(GigatrainError):
    """A checkpoint or a weights folder is missing, damaged or belongs to another run."""

    exit_code = 6


class RunError(GigatrainError):
    """The run cannot start or go on: the folder is taken, the loss is not finite, a device is missing."""

    exit_code = 7


class KernelError(GigatrainError):
    """A fused kernel cannot run these inputs here; the reference of the same operation can."""

    exit_code = 8


class HealthError(GigatrainError):
    """Machines that are not fit to train: this one, or too few of a job's."""

    exit_code = 9


class PowerError(GigatrainError):
    """A meter, a power limit or a schedule is not as it is said to be, or watts are asked for that nobody can give."""

    exit_code = 10
