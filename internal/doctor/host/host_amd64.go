package host

const (
	qemuBinary  = "qemu-system-x86_64"
	qemuPackage = "qemu-system-x86"
)
