// Package store keeps banger's rows in SQLite: VMs and their history. It is the only package that
// speaks SQL. A VM's row is also its intent: a state that is passed through (starting, stopping,
// deleting) is written before the first side effect, so that a daemon that died can be cleaned up after.
package store

// Store is an open database. Its methods may be called from several goroutines.
type Store struct{}
