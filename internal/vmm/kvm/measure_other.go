//go:build !amd64

package kvm

// measure believes KVM elsewhere: only x86 is known to have a paravirtual one.
func measure(int, int) Result { return Result{Usable: true} }
