// Package packaging holds the tests of how banger is installed: scripts/install, the systemd unit and the Debian package,
// all put below temporary directories.
package packaging
