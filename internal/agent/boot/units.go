package boot

import (
	"fmt"
	"path/filepath"
	"regexp"
	"strings"

	agentv1 "banger/api/agent/v1"
	"banger/internal/agent/identity"
)

const (
	unitDir      = "run/systemd/system"
	generatorDir = "run/systemd/system-generators"
)

// agentUnit makes the agent that runs already a service of systemd's. "adopt" moves it into the unit's
// control group, or starts another one when it has died. It is not stopped at shutdown but ends with the last
// processes, so that the host can ask until then.
const agentUnit = `[Unit]
Description=banger's agent in the guest
DefaultDependencies=no
After=ssh.service
IgnoreOnIsolate=yes
StartLimitIntervalSec=0

[Service]
Type=forking
PIDFile=` + PIDFile + `
ExecStart=` + AgentPath + ` adopt %s
Restart=always
RestartSec=200ms
KillMode=process
OOMPolicy=continue
`

// sshUnit lets sshd start at once: the init has already mounted the disks, set up the network and
// written the keys that it would wait for.
const sshUnit = `[Unit]
DefaultDependencies=no
Conflicts=shutdown.target
Before=shutdown.target

[Service]
ExecStartPre=
`

// managerConf bounds how long a unit may hold up the shutdown.
const managerConf = `[Manager]
DefaultTimeoutStopSec=10s
`

// writeUnits writes what systemd is to know below root/run.
func writeUnits(root string, cfg *agentv1.GuestConfig) error {
	for name, text := range map[string]string{
		unitDir + "/banger-agent.service":          fmt.Sprintf(agentUnit, channelOf(cfg)),
		unitDir + "/ssh.service.d/50-banger.conf":  sshUnit,
		"run/systemd/system.conf.d/50-banger.conf": managerConf,
	} {
		if err := identity.File(root, name, text, 0o644); err != nil {
			return err
		}
	}
	if err := identity.Link(root, unitDir+"/multi-user.target.wants/banger-agent.service", "../banger-agent.service"); err != nil {
		return err
	}
	return mask(root, cfg.GetMaskedUnits())
}

// mask masks units; generators, which are told by their names' ending; and what a unit wants ("a.target.wants/b.service"),
// so that b is there for those who ask for it but does not start by itself (systemd.unit(5)).
func mask(root string, names []string) error {
	for _, name := range names {
		wants, unit := filepath.Split(name)
		if unit == "" || strings.HasPrefix(unit, ".") || wants != "" && !wantsDir.MatchString(wants) {
			return fmt.Errorf("%q cannot be masked: it is no unit's name", name)
		}
		dir := unitDir
		if strings.HasSuffix(name, "-generator") {
			dir = generatorDir
		}
		if err := identity.Link(root, filepath.Join(dir, name), "/dev/null"); err != nil {
			return err
		}
	}
	return nil
}

var wantsDir = regexp.MustCompile(`^[A-Za-z0-9@:_-]+\.[a-z]+\.wants/$`)
