// Package channel turns one byte pipe between host and guest into many streams.
//
// The pipe is a virtio-serial port in the guest and a Unix socket on the host. Host connections come
// and go while the guest's end stays open, and the guest may not notice the change: so the bytes are
// stuffed, and a connection begins with a reset that payload cannot forge.
//
//	ESC 00            a literal ESC byte
//	ESC 'R' nonce     reset; the nonce is 8 bytes, stuffed like payload
//	ESC 'W' word      a word: its kind and tag (a byte each), length (4 bytes, big-endian) and payload, stuffed likewise
//	ESC ESC           the first one was cut off by a reconnect: read on from the second
//
// The host begins a connection with a reset and a random nonce. The guest drops its old session, answers
// with a reset and the same nonce, and starts a new one; the host discards everything before that answer. An answer
// may be lost with all that follows on this connection: a host without one connects again and repeats its reset. The
// answer to any of them will do, for resets arrive in order and nothing but resets comes before the last one.
// A guest that has no session (it has just started, or its session failed) says so by a reset with a nonce of
// zeros, so that a host that waits asks again and a host that believes in an older session gives it up.
//
// After the resets both ends speak yamux. The guest sets its end of that up at the first payload: until then, and beside
// it, words may be said, questions of the host's that the guest answers with a word of the same tag. They need none of
// what streams need, and are what a guest is asked that was just restored.
//
// For a guest that was restored from memory it is the same: its session is that of a host which has gone,
// maybe cut off within a frame, and the new host's reset ends it before a byte of the old one can be taken for
// one of the new. Nothing at the guest's end looks at the wall clock, which jumps then: there are no keepalives,
// and all its time limits run on the monotonic clock, which stood still while the guest did.
package channel
