package cli

import (
	"strings"
	"testing"

	"banger/internal/doctor"
)

// TestDoctorJudgesTheNetwork: what keeps VMs from others and from names is a warning, TAP devices that wait are not.
func TestDoctorJudgesTheNetwork(t *testing.T) {
	well := networkView{TAPsReady: 4, TAPsWanted: 4, OpenedChains: []string{"ip filter FORWARD"}}
	clash, notice := well, well
	clash.SubnetProblem = "subnet 172.30.0.0/16 clashes with the route to 172.30.0.0/24 on wg0"
	notice.Notices = []string{"chain inet firewalld filter_FORWARD denies"}
	for name, c := range map[string]struct {
		result doctor.Result
		status doctor.Status
		text   string
	}{
		"well":        {judgeNetwork(daemonView{Bridge: "banger0", Subnet: "172.30.0.0/16", Network: well}), doctor.OKStatus, "4 of 4 TAP devices wait"},
		"opened":      {judgeNetwork(daemonView{Bridge: "banger0", Subnet: "172.30.0.0/16", Network: well}), doctor.OKStatus, "ip filter FORWARD"},
		"no VM yet":   {judgeNetwork(daemonView{}), doctor.OKStatus, "first VM"},
		"clash":       {judgeNetwork(daemonView{Subnet: "172.30.0.0/16", Network: clash}), doctor.Warning, "wg0"},
		"notice":      {judgeNetwork(daemonView{Subnet: "172.30.0.0/16", Network: notice}), doctor.Warning, "firewalld"},
		"names":       {judgeNames(daemonView{DNS: dnsDaemonView{Listener: "127.0.0.1:42069", Records: 1}}), doctor.OKStatus, "1 name on 127.0.0.1:42069"},
		"port taken":  {judgeNames(daemonView{DNS: dnsDaemonView{Problem: "127.0.0.1:42069 is taken"}}), doctor.Warning, "taken"},
		"no listener": {judgeNames(daemonView{}), doctor.OKStatus, "nowhere"},
	} {
		if c.result.Status != c.status || !strings.Contains(c.result.Message, c.text) {
			t.Errorf("%s: %+v", name, c.result)
		}
	}
}

// TestDoctorJudgesTheCatalogue: damage is no good news, and without a default that works VMs cannot be made.
func TestDoctorJudgesTheCatalogue(t *testing.T) {
	good, old := doctored{name: "good", isDefault: true}, doctored{name: "old", notice: "it is old"}
	damaged := doctored{name: "bad", problem: "a file is missing; make it again with: banger setup --rebuild"}
	for name, c := range map[string]struct {
		all    []doctored
		status doctor.Status
		text   string
	}{
		"none":            {nil, doctor.OKStatus, "banger setup"},
		"well":            {[]doctored{good}, doctor.OKStatus, "1, all of them sound"},
		"old":             {[]doctored{good, old}, doctor.Warning, "old: it is old"},
		"one damaged":     {[]doctored{good, damaged}, doctor.Warning, "banger setup --rebuild"},
		"default damaged": {[]doctored{old, damaged}, doctor.MissingStatus, "no default that works"},
	} {
		if got := judgeCatalogue(c.all); got.Status != c.status || !strings.Contains(got.Message, c.text) {
			t.Errorf("%s: %+v", name, got)
		}
	}
}
