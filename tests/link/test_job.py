"""What is said of one migration holds together, whenever it is asked."""

from types import SimpleNamespace

from postcopy.link.guest.job import Job
from postcopy.parameters import Settings
from postcopy.statistics import Measured, MigrationInfo
from postcopy.status import Status


class Ending:
    """A progress that comes to its end in the very moment in which it is asked for."""

    def __init__(self, job):
        self._job = job

    @property
    def status(self):
        measured = Measured(restore_running_us=7, restore_complete_us=9)
        self._job.note(MigrationInfo(status=Status.COMPLETED, measured=measured), None)
        return Status.COMPLETED


def test_the_figures_belong_to_the_status():
    job = Job(SimpleNamespace(tell=lambda *_: None), Settings())
    job.note(MigrationInfo(status=Status.ACTIVE, measured=Measured(restore_complete_us=9)), None)
    job.progress = Ending(job)
    info = job.info()
    assert info.status is Status.COMPLETED
    assert info.measured.restore_running_us == 7
