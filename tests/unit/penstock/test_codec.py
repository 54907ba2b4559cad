import pytest

from penstock.codec import install_mode_from_wire, install_mode_to_wire
from penstock.errors import ProtocolError
from penstock.trajectory import InstallMode
from penstock.v1 import coordinator_pb2


@pytest.mark.parametrize("mode", InstallMode)
def test_every_install_mode_crosses_the_wire(mode: InstallMode) -> None:
    assert install_mode_from_wire(install_mode_to_wire(mode)) is mode


def test_a_learner_that_names_no_install_mode_is_refused() -> None:
    with pytest.raises(ProtocolError, match="install mode"):
        install_mode_from_wire(coordinator_pb2.INSTALL_MODE_UNSPECIFIED)
