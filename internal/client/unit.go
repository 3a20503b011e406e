package client

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"banger/internal/fault"
	"banger/internal/paths"
	"banger/internal/system"
)

// unitName is the daemon's unit of the user's systemd, as it is installed.
const unitName = "bangerd.service"

// Renew ends the daemon, if one runs, so that the next Dial starts one of this build. A daemon that systemd looks after
// is left to it, and runs again when Renew returns: one that we started in its place would be out of the unit, with
// another environment.
func Renew(ctx context.Context, o Options) error {
	if command, err := o.command(); err != nil || !runsInUnit(o.Paths, command[0]) {
		_, err := Stop(ctx, o.Paths)
		return err
	}
	// Whoever finds no daemon in between waits, and does not start one beside the unit.
	turn, err := takeTurn(ctx, o.Paths)
	if err != nil {
		return err
	}
	defer turn.Close()
	return restartUnit(ctx, o)
}

// runsInUnit tells whether the daemon of p is the unit's, and of the program that we would start. It may have been replaced
// by a newer one meanwhile.
func runsInUnit(p paths.Paths, program string) bool {
	if os.Getenv("XDG_RUNTIME_DIR") == "" { // by which systemctl finds the user's systemd: a shell of su, or of cron
		return false
	}
	h, proc := holder(p)
	if proc == nil {
		return false
	}
	defer proc.Close()
	if !system.InUserUnit(h.PID, unitName) {
		return false
	}
	theirs, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", h.PID))
	if err != nil {
		return false
	}
	ours, err := filepath.EvalSymlinks(program)
	return err == nil && strings.TrimSuffix(theirs, " (deleted)") == ours
}

// restartUnit has systemd start the daemon anew, by the unit as it is now. The unit is Type=notify: then it listens.
func restartUnit(ctx context.Context, o Options) error {
	systemctl, err := system.Find("systemctl", "systemd")
	if err != nil {
		return err
	}
	for _, words := range [][]string{{"daemon-reload"}, {"restart", unitName}} {
		_, err = system.Run(ctx, system.Command{
			Path: systemctl, Args: append([]string{"--user"}, words...), Env: o.Env, Timeout: startTimeout + stopTimeout,
		})
		if err != nil {
			break
		}
	}
	if err != nil && ctx.Err() == nil {
		return fault.Wrap(fault.Precondition, err, "systemd did not restart the daemon").
			WithHint("why, tells: systemctl --user status bangerd; the daemon's log is %s", o.Paths.DaemonLog())
	}
	return err
}
