// Package system is the approved way to other programs: run one and wait for it, start one that
// outlives us, find a started one again by pid and start time, and stop it without ever signalling
// a stranger. No other room of the host's side holds os/exec.
package system
