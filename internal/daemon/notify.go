package daemon

import (
	"log/slog"

	"github.com/coreos/go-systemd/v22/daemon"
)

// What the service manager is told, when one waits for it (sd_notify(3)): with Type=notify in the unit, "systemctl start" returns
// when the socket is there.
const (
	adopting = daemon.SdNotifyReady + "\nSTATUS=looking after the VMs of its predecessor"
	serving  = "STATUS=serving"
	stopping = daemon.SdNotifyStopping
)

// tellManager tells the service manager how far the daemon is. What it did not hear it makes up by its own deadlines.
func tellManager(state string, logger *slog.Logger) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		logger.Warn("the service manager cannot be told", "state", state, "error", err)
	}
}
