package host

const (
	qemuBinary  = "qemu-system-aarch64"
	qemuPackage = "qemu-system-arm"
)
