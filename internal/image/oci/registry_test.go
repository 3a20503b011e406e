package oci

import (
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"banger/internal/fault"
)

// fetch fetches team/box:1 from a server.
func fetch(ctx context.Context, t *testing.T, server string, room int64) (*Image, error) {
	t.Helper()
	ref := strings.TrimPrefix(server, "http://") + "/team/box:1"
	return Fetch(ctx, ref, Options{Dir: t.TempDir(), Architecture: testArchitecture, Room: room})
}

// filled starts a registry with an image in it, in front of which is what spoils it. May be nil.
func filled(t *testing.T, image v1.Image, spoil func(inner http.Handler) http.Handler) string {
	t.Helper()
	inner := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	if spoil == nil {
		spoil = func(h http.Handler) http.Handler { return h }
	}
	plain := httptest.NewServer(inner)
	defer plain.Close()
	if err := remote.Write(tag(t, strings.TrimPrefix(plain.URL, "http://")+"/team/box:1"), image); err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(spoil(inner))
	t.Cleanup(server.Close)
	return server.URL
}

func TestFetch(t *testing.T) {
	image := testImage(t, testArchitecture, "A=1")
	url := filled(t, image, nil)
	var told atomic.Int64
	i, err := Fetch(t.Context(), strings.TrimPrefix(url, "http://")+"/team/box:1", Options{
		Dir: t.TempDir(), Architecture: testArchitecture, Room: 1 << 20, Progress: func(done, _ int64) { told.Store(max(told.Load(), done)) },
	})
	if err != nil {
		t.Fatal(err)
	}
	digest, err := image.Digest()
	if err != nil || i.Digest != digest.String() || i.Reference != strings.TrimPrefix(url, "http://")+"/team/box:1" || told.Load() != i.Bytes || i.Bytes == 0 {
		t.Errorf("%+v, told of %d bytes, %v", i, told.Load(), err)
	}
	if got, err := readAll(i); err != nil || len(got) != 2 {
		t.Errorf("%d layers, %v", len(got), err)
	}
	if _, err := fetch(t.Context(), t, url, 10); fault.KindOf(err) != fault.Precondition || !strings.Contains(err.Error(), "no room") {
		t.Errorf("with no room for it: %v", err)
	}
	_, err = Fetch(t.Context(), strings.TrimPrefix(url, "http://")+"/team/box:1", Options{Dir: t.TempDir(), Architecture: "s390x"})
	if fault.KindOf(err) != fault.Precondition {
		t.Errorf("for another machine: %v", err)
	}
}

// behind answers requests for the image itself; the registry is there.
func behind(f http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/v2/" {
			f(w, r)
		}
	}
}

func code(n int) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(n) }
}

// realm is a registry that wants a token, and tells to ask for it where token answers.
func realm(token http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/token" {
			token(w, r)
			return
		}
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token",service="registry"`, r.Host))
		w.WriteHeader(http.StatusUnauthorized)
	}
}

func endless(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
	for b := make([]byte, 1<<20); ; {
		if _, err := w.Write(b); err != nil {
			return
		}
	}
}

// TestRegistryRefuses: a registry that says no, breaks, or says nothing.
func TestRegistryRefuses(t *testing.T) {
	say := func(text string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, text) }
	}
	for what, c := range map[string]struct {
		answer http.HandlerFunc
		kind   fault.Kind
		says   string
	}{
		"401":                {code(401), fault.Precondition, "does not let us"},
		"401 for the image":  {behind(code(401)), fault.Precondition, "does not let us"},
		"403":                {behind(code(403)), fault.Precondition, "does not let us"},
		"404":                {behind(code(404)), fault.NotFound, "no image"},
		"429":                {behind(code(429)), fault.Precondition, "less often"},
		"500":                {code(500), fault.Precondition, "500"},
		"hangs up":           {func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, fault.Precondition, "cannot fetch"},
		"nonsense":           {say("<html>"), fault.Precondition, ""},
		"no end":             {behind(endless), fault.Precondition, "cannot fetch"},
		"no token":           {realm(code(401)), fault.Precondition, "does not let us"},
		"no token for us":    {realm(code(403)), fault.Precondition, "does not let us"},
		"no token service":   {realm(code(404)), fault.Precondition, "token"},
		"broken token":       {realm(code(500)), fault.Precondition, "500"},
		"nonsense for token": {realm(say("<html>")), fault.Precondition, "cannot fetch"},
		"token of no use":    {realm(say(`{"token": "x"}`)), fault.Precondition, "does not let us"},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			server := httptest.NewServer(c.answer)
			defer server.Close()
			_, err := fetch(t.Context(), t, server.URL, 0)
			if fault.KindOf(err) != c.kind || !strings.Contains(fmt.Sprint(err), c.says) || fault.HintOf(err) == "" {
				t.Errorf("error %v (%v), hint %q", err, fault.KindOf(err), fault.HintOf(err))
			}
		})
	}
}

// TestRegistryIsSilent: nobody there, or nobody who says a word.
func TestRegistryIsSilent(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = l.Close()
	if _, err = fetch(t.Context(), t, "http://"+l.Addr().String(), 0); fault.KindOf(err) != fault.Precondition || fault.HintOf(err) == "" {
		t.Errorf("nobody there: %v", err)
	}
	release := make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-release }))
	defer server.Close()
	defer close(release)
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := fetch(ctx, t, server.URL, 0); fault.KindOf(err) != fault.Timeout {
		t.Errorf("not a word: %v", err)
	}
}

// TestStall: an answer that begins, and does not go on, ends.
func TestStall(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", "10")
		_, _ = w.Write([]byte("x"))
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	}))
	defer server.Close()
	client := http.Client{Transport: impatient{http.DefaultTransport, 300 * time.Millisecond}}
	answer, err := client.Get(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	if got, err := io.ReadAll(answer.Body); fault.KindOf(err) != fault.Timeout {
		t.Errorf("%q, %v", got, err)
	}
}

// TestSlowIsNoStall: an answer that goes on slowly does not end.
func TestSlowIsNoStall(t *testing.T) {
	const stall = time.Minute
	synctest.Test(t, func(t *testing.T) {
		r, w := io.Pipe()
		go func() {
			for range 10 {
				_, _ = w.Write([]byte("x"))
				time.Sleep(stall - time.Second)
			}
			_ = w.Close()
		}()
		body := &watched{ReadCloser: r, stall: stall}
		if got, err := io.ReadAll(body); err != nil || len(got) != 10 {
			t.Errorf("%q, %v", got, err)
		}
	})
}

// TestRegistryBreaksOff: a layer that breaks off is fetched again; one that is another than was named, longer or shorter, is
// refused, and so is a configuration without end.
func TestRegistryBreaksOff(t *testing.T) {
	image := testImage(t, testArchitecture, "A=1")
	all, err := image.Layers()
	if err != nil {
		t.Fatal(err)
	}
	digest, err := all[0].Digest()
	if err != nil {
		t.Fatal(err)
	}
	config, err := image.ConfigName()
	if err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]struct {
		of    string
		spoil func(asked int, body []byte) (told int, sent []byte)
		good  bool
	}{
		"once": {digest.String(), func(asked int, body []byte) (int, []byte) {
			if asked == 1 {
				return len(body), body[:len(body)/2]
			}
			return len(body), body
		}, true},
		"other":         {digest.String(), func(_ int, body []byte) (int, []byte) { body[len(body)/2] ^= 1; return len(body), body }, false},
		"shorter":       {digest.String(), func(_ int, body []byte) (int, []byte) { return len(body) / 2, body[:len(body)/2] }, false},
		"longer":        {digest.String(), func(_ int, body []byte) (int, []byte) { return len(body) + 5, append(body, "longer"[:5]...) }, false},
		"configuration": {config.String(), func(_ int, body []byte) (int, []byte) { return len(body) + 5, append(body, "     "...) }, false},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			var asked atomic.Int64
			url := filled(t, image, func(inner http.Handler) http.Handler {
				return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					if r.Method != http.MethodGet || !strings.HasSuffix(r.URL.Path, c.of) {
						inner.ServeHTTP(w, r)
						return
					}
					recorded := httptest.NewRecorder()
					inner.ServeHTTP(recorded, r)
					told, sent := c.spoil(int(asked.Add(1)), recorded.Body.Bytes())
					w.Header().Set("Content-Length", fmt.Sprint(told))
					_, _ = w.Write(sent)
				})
			})
			i, err := fetch(t.Context(), t, url, 0)
			if err == nil {
				_, err = readAll(i)
			}
			if c.good && err != nil || !c.good && fault.KindOf(err) != fault.Precondition {
				t.Errorf("after %d requests: %v", asked.Load(), err)
			}
		})
	}
}
