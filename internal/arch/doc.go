// Package arch holds the floor plan of the house as a test: one table of who may import whom, and
// who holds the keys to packages that touch the host.
package arch
