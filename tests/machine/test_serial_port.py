"""The serial port's registers, as far as a guest that only speaks can see them."""

from postcopy.machine.ports import LINE_STATUS, SCRATCH, PortBus, SerialPort


def test_what_is_written_comes_out():
    said = bytearray()
    port = SerialPort(said.extend)
    for byte in b"hello":
        assert port.read(LINE_STATUS) == 0x60
        port.write(0, byte)
    assert said == b"hello"


def test_registers_keep_what_they_get():
    port = SerialPort(lambda data: None)
    port.write(SCRATCH, 0x5A)
    port.write(3, 0x83)  # divisor latch
    port.write(0, 0x01)
    port.write(1, 0x02)
    assert (port.read(0), port.read(1)) == (0x01, 0x02)
    port.write(3, 0x03)
    port.write(1, 0xFF)
    port.write(2, 0xC7)
    assert (port.read(1), port.read(2), port.read(SCRATCH)) == (0x0F, 0xC1, 0x5A)
    assert port.state.divider == 0x0201
    again = SerialPort(lambda data: None)
    again.state = port.state
    assert [again.read(n) for n in range(8)] == [port.read(n) for n in range(8)]


def test_ports():
    said, left = bytearray(), []
    bus = PortBus(SerialPort(said.extend), left.append)
    bus.write(0x3F8, 1, ord("x"))
    bus.write(0x80, 1, 1)
    bus.write(0xF4, 4, 7)
    assert (said, left) == (b"x", [7])
    assert bus.read(0x3FD, 1) == 0x60
    assert [bus.read(0x70, size) for size in (1, 2, 4)] == [0xFF, 0xFFFF, 0xFFFFFFFF]
