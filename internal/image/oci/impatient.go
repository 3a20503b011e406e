package oci

import (
	"io"
	"net/http"
	"sync/atomic"
	"time"

	"banger/internal/fault"
)

// impatient ends answers of which nothing comes for so long. Each answer, also a manifest: a connection that is kept open
// and says nothing ends by no other limit.
type impatient struct {
	http.RoundTripper
	stall time.Duration
}

// RoundTrip implements http.RoundTripper.
func (i impatient) RoundTrip(r *http.Request) (*http.Response, error) {
	answer, err := i.RoundTripper.RoundTrip(r)
	if err == nil {
		answer.Body = &watched{ReadCloser: answer.Body, stall: i.stall}
	}
	return answer, err
}

// watched is the body of an answer.
type watched struct {
	io.ReadCloser
	stall time.Duration
}

// Read closes the body when nothing comes, which ends the read that waits. A reader that takes its time is no stall.
func (w *watched) Read(b []byte) (int, error) {
	var stalled atomic.Bool
	watch := time.AfterFunc(w.stall, func() {
		stalled.Store(true)
		_ = w.Close()
	})
	n, err := w.ReadCloser.Read(b)
	watch.Stop()
	if err != nil && stalled.Load() {
		err = fault.New(fault.Timeout, "the registry sent nothing for %s", w.stall).WithHint("check the network, then try again")
	}
	return n, err
}
