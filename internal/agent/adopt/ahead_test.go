package adopt

import "testing"

func TestPlainCommand(t *testing.T) {
	for shown, want := range map[string]string{
		"ExecStart={ path=/usr/lib/systemd/systemd-journald ; argv[]=/usr/lib/systemd/systemd-journald ; ignore_errors=no ; pid=0 }\n": "/usr/lib/systemd/systemd-journald",
		"ExecStart={ path=/usr/sbin/sshd ; argv[]=/usr/sbin/sshd -D $SSHD_OPTS ; ignore_errors=no ; start_time=[n/a] }\n":              "/usr/sbin/sshd -D $SSHD_OPTS",
		"ExecStart={ path=/bin/sh ; argv[]=/bin/sh -c 'x; y' ; ignore_errors=no }\n":                                                   "",
		"ExecStart={ path=/a ; argv[]=/a ; pid=0 }\nExecStart={ path=/b ; argv[]=/b ; pid=0 }\n":                                       "",
		"ExecStart={ path=/a ; argv[]=/a %n ; pid=0 }\n":                                                                               "",
		"ExecStart=\n": "",
		"":             "",
	} {
		if got := plainCommand(shown); got != want {
			t.Errorf("%q: %q, want %q", shown, got, want)
		}
	}
}
