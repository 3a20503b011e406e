// Package e2e tests the whole product as a user meets it: the built programs, real VMs, and kill -9 at bad
// moments. Everything runs in a network namespace and a state directory of its own.
package e2e
