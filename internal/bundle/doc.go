// Package bundle is the runtime directory: what banger needs beside its own programs and does not build itself, such
// as Firecracker, or a kernel and an image that were made elsewhere. It is ./runtime in a source checkout and
// ../lib/banger beside an installed program; BANGER_RUNTIME_DIR names another one. bundle.json in it says what is what;
// a directory without it is read by the names of its files. Nothing here is changed: package supply does that.
package bundle
