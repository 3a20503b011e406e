// Package fakefc is a program that stands in for Firecracker in tests. It speaks the API as Firecracker does, as strictly:
// phases, required and unknown fields, status codes, the bytes of its answers, exit codes, one request at a time. What
// it boots is a scripted guest, whose agent is the guest's own service behind a vsock with the CONNECT handshake.
//
// Source of what it does: Firecracker's OpenAPI description, documentation and observed behaviour of the releases 1.10
// to 1.17, on x86-64. It is written from those and not from banger's client, so that it is a check of that one; where a
// real binary was seen to differ from its documentation, a comment at that place says so. Messages are in its spirit,
// with the tokens that people and programs search for, not in its words.
package fakefc
