package guest

import "slices"

// maskGroups are the systemd units, and by the ending "-generator" the unit generators, that a
// micro-VM rarely needs. Under software emulation each of them costs some hundred milliseconds until
// SSH answers. A VM with stock units has them all, and an image can name its own list. What an image
// does not have is harmless here.
var maskGroups = [][]string{
	// Devices are there when the kernel is: the disks are mounted and the network is set up by our
	// init, nothing is plugged in later, and no rule names a device.
	{
		"systemd-udevd.service", "systemd-udevd-control.socket", "systemd-udevd-kernel.socket", "systemd-udev-trigger.service",
		"systemd-udev-settle.service", "systemd-udev-load-credentials.service", "systemd-hwdb-update.service",
	},
	// The address and the name servers are static and set by our init; a network daemon would take them away.
	{
		"systemd-networkd.service", "systemd-networkd.socket", "systemd-networkd-wait-online.service", "systemd-network-generator.service",
		"networking.service", "ifupdown-pre.service", "NetworkManager.service", "systemd-resolved.service",
	},
	// The host keeps the guest's clock.
	{"systemd-timesyncd.service", "systemd-time-wait-sync.service", "chrony.service", "ntpsec.service"},
	// Nobody sits at a console: people come by SSH, programs by the agent. A session needs no logind
	// unless it runs a desktop or services of its user; logind is there for whoever asks it for something.
	{
		"getty.target", "getty@tty1.service", "serial-getty@ttyS0.service", "serial-getty@hvc0.service", "console-getty.service",
		"getty-static.service", "systemd-getty-generator", "multi-user.target.wants/systemd-logind.service", "systemd-ask-password-console.path",
		"systemd-ask-password-wall.path",
	},
	// Modules that are needed are loaded by our init; the others on demand.
	{
		"systemd-modules-load.service", "kmod-static-nodes.service", "modprobe@configfs.service", "modprobe@dm_mod.service",
		"modprobe@drm.service", "modprobe@efi_pstore.service", "modprobe@fuse.service", "modprobe@loop.service",
	},
	// File systems for debugging and hardware that is not there.
	{
		"sys-kernel-debug.mount", "sys-kernel-tracing.mount", "sys-kernel-config.mount", "sys-fs-fuse-connections.mount",
		"dev-hugepages.mount", "proc-sys-fs-binfmt_misc.automount", "systemd-binfmt.service", "systemd-pstore.service",
		"systemd-pcrmachine.service", "systemd-pcrphase.service", "systemd-pcrphase-sysinit.service", "systemd-tpm2-setup.service",
		"systemd-tpm2-setup-early.service", "systemd-tpm2-generator",
	},
	// The root file system is an overlay without partitions: nothing to check, grow, remount or resume from.
	{
		"systemd-remount-fs.service", "systemd-fsck-root.service", "systemd-growfs-root.service", "systemd-repart.service",
		"systemd-gpt-auto-generator", "systemd-hibernate-clear.service", "systemd-hibernate-resume-generator",
	},
	// First boot and updates: our init sets machine id, host keys and entropy.
	{
		"systemd-firstboot.service", "systemd-machine-id-commit.service", "systemd-random-seed.service", "sshd-keygen.service",
		"systemd-journal-catalog-update.service", "systemd-update-done.service", "ldconfig.service", "systemd-system-update-generator",
	},
	// Compatibility with what Debian's packages no longer bring, and sockets for SSH beside the network.
	{
		"systemd-rc-local-generator", "systemd-sysv-generator", "systemd-ssh-generator", "systemd-debug-generator",
		"systemd-run-generator", "systemd-initctl.socket", "run-lock.mount",
	},
	// Users, credentials and extensions come with the image; device nodes are made by our init.
	{
		"systemd-sysusers.service", "systemd-creds.socket", "systemd-sysext.socket", "systemd-pcrlock.socket", "systemd-pcrextend.socket",
		"systemd-tmpfiles-setup-dev.service", "systemd-tmpfiles-setup-dev-early.service",
	},
	// Old images bring their own idea of what lies on other disks.
	{"home.mount", "var.mount"},
	// Housekeeping at a time of its own choosing.
	{
		"apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "e2scrub_reap.service",
		"fstrim.timer", "systemd-tmpfiles-clean.timer",
	},
}

// DefaultMasks returns the units masked in a VM with fast units whose image names no list of its own, sorted.
func DefaultMasks() []string {
	all := slices.Concat(maskGroups...)
	slices.Sort(all)
	return all
}
