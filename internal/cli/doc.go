// Package cli is the command line people use. Each command is one file of one shape: newXCommand
// builds the cobra command, an options struct holds its flags, and runX does the work with an Env
// and knows no cobra. What a command yields goes to stdout; talk, progress and errors to stderr.
package cli
