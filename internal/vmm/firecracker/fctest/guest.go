package fctest

import "encoding/binary"

// Banner is the first line of every bare guest, and Tick the beginning of the lines of one that counts; eight
// hexadecimal digits follow it.
const (
	Banner = "bare guest"
	Tick   = "tick "
)

// Lines that guests say before they end.
const (
	RebootLine   = "reboot: Restarting system"
	PowerOffLine = "reboot: Power down"
	PanicLine    = "Kernel panic - not syncing: asked for"
)

// Ending is what a bare guest does once it has said its banner.
type Ending int

// The endings of bare guests.
const (
	Count       Ending = iota // counts on the console for ever; a key press is a reset
	Reset                     // reboots, which ends Firecracker
	Halt                      // powers off, which ends nothing
	Panic                     // says that its kernel panicked, and resets
	TripleFault               // makes the processor give up
)

// Guest returns a kernel that is all of its guest: some x86-64 machine code that needs no device but a serial port at
// 0x3f8 and a keyboard controller at 0x60. It runs where real kernels would take too long, and says what it does.
func Guest(e Ending) []byte {
	var c code
	c.emit(0xba, 0xf8, 0x03, 0x00, 0x00) // mov edx, 0x3f8
	c.say(Banner + "\n")
	switch e {
	case Count:
		c.count()
	case Halt:
		c.say(PowerOffLine + "\n")
		c.stand()
	case Panic:
		c.say(PanicLine + "\n")
	case TripleFault:
		c.emit(0x6a, 0x00, 0x6a, 0x00) // push 0; push 0
		c.emit(0x0f, 0x01, 0x1c, 0x24) // lidt [rsp]: there are no handlers
		c.emit(0xcc, 0xeb, 0xfd)       // again: int3; jmp again
	case Reset:
		c.say(RebootLine + "\n")
	}
	c.reset()
	return image(c)
}

// code is machine code, which runs in 64-bit mode with the first memory mapped as it is.
type code []byte

func (c *code) emit(b ...byte) { *c = append(*c, b...) }

// say writes text to the port in dx.
func (c *code) say(text string) {
	for _, b := range []byte(text) {
		c.emit(0xb0, b, 0xee) // mov al, b; out dx, al
	}
}

// reset pulls the processor's reset line by the keyboard controller.
func (c *code) reset() {
	c.emit(0xb0, 0xfe, 0xe6, 0x64) // mov al, 0xfe; out 0x64, al
	c.stand()
}

func (c *code) stand() { c.emit(0xfa, 0xf4, 0xeb, 0xfd) } // cli; again: hlt; jmp again

// ticks is how many cycles of the processor's clock lie between two ticks: some hundredths of a second.
const ticks = 1 << 26

// count says a number that it keeps in memory, waits, and goes on; a key press is where it ends, with a reset to come.
func (c *code) count() {
	c.emit(0xbd, 0x00, 0x00, 0x20, 0x00) // mov ebp, 0x200000
	again := len(*c)
	c.emit(0xba, 0xf8, 0x03, 0x00, 0x00) // mov edx, 0x3f8
	c.emit(0xff, 0x45, 0x00)             // inc dword [rbp]
	c.emit(0x8b, 0x5d, 0x00)             // mov ebx, [rbp]
	c.say(Tick)
	c.emit(0xb9, 0x08, 0x00, 0x00, 0x00) // mov ecx, 8
	digit := len(*c)
	c.emit(0xc1, 0xc3, 0x04)            // rol ebx, 4
	c.emit(0x88, 0xd8, 0x24, 0x0f)      // mov al, bl; and al, 15
	c.emit(0x04, '0', 0x3c, '9'+1)      // add al, '0'; cmp al, '9'+1
	c.emit(0x72, 0x02, 0x04, 'a'-'9'-1) // jb +2; add al, 39
	c.emit(0xee, 0xff, 0xc9, 0x75)      // out dx, al; dec ecx; jnz digit
	c.near(digit)
	c.say("\n")
	c.clock()
	c.emit(0x48, 0x8d, 0xb8) // lea rdi, [rax+ticks]
	*c = binary.LittleEndian.AppendUint32(*c, ticks)
	wait := len(*c)
	c.emit(0xf3, 0x90) // pause
	c.clock()
	c.emit(0x48, 0x39, 0xf8, 0x72) // cmp rax, rdi; jb wait
	c.near(wait)
	c.emit(0xe4, 0x64, 0xa8, 0x01, 0x0f, 0x84) // in al, 0x64; test al, 1; jz again
	*c = binary.LittleEndian.AppendUint32(*c, uint32(again-len(*c)-4))
	c.emit(0xba, 0xf8, 0x03, 0x00, 0x00) // mov edx, 0x3f8
	c.say(RebootLine + "\n")
}

// near ends a short jump to a place before.
func (c *code) near(to int) { c.emit(byte(int8(to - len(*c) - 1))) }

// clock reads the time stamp counter into rax.
func (c *code) clock() { c.emit(0x0f, 0x31, 0x48, 0xc1, 0xe2, 0x20, 0x48, 0x09, 0xd0) } // rdtsc; shl rdx, 32; or rax, rdx
