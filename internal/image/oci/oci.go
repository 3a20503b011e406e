// Package oci reads container images: from a registry, from an OCI layout directory, from an archive as "docker save"
// and its like write it. What it gives are layers, verified as they are read, and what the image says about itself.
package oci

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"strings"
	"sync/atomic"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"banger/internal/debian"
	"banger/internal/fault"
	"banger/internal/image/layer"
)

const (
	maxLayers   = 512     // of an image; engines stop at 127
	maxDocument = 8 << 20 // bytes of what an image says of itself; registries stop at 4 MiB
)

// Image is a container image whose layers are at hand.
type Image struct {
	Reference string        // canonical, with registry and tag; empty: it has none
	Digest    string        // of its manifest, "sha256:" and 64 hex digits; empty: it has none
	Env       []string      // NAME=value
	Layers    []layer.Layer // the lowest first
	Bytes     int64         // of the layers as they are stored, where that is known
}

// Options say which image is wanted, and where there is room.
type Options struct {
	Dir          string // for temporary files, the caller's to remove
	Architecture string // as Go and Debian call it
	Select       string // of several images in one file, the one of this name
	Room         int64  // bytes that may be written to Dir; 0: no bound
	// Progress is told how far the fetching is; nil: nobody wants to know.
	Progress func(done, all int64)
}

func (o Options) platform() v1.Platform {
	return v1.Platform{OS: "linux", Architecture: o.Architecture}
}

// hasRoom tells whether bytes more may be written.
func (o Options) hasRoom(bytes int64) error {
	if o.Room == 0 || bytes <= o.Room {
		return nil
	}
	return fault.New(fault.Precondition, "no room for the image: there is less than %d MB in %s", (bytes+999_999)/1_000_000, o.Dir).WithHint("free some space there")
}

// describeStored is describe for an image with a manifest of its own.
func describeStored(i v1.Image, o Options) (*Image, []v1.Layer, error) {
	manifest, err := i.Manifest()
	if err != nil {
		return nil, nil, explainDamage(err)
	}
	if size := manifest.Config.Size; size > maxDocument {
		return nil, nil, fault.New(fault.Precondition, "the image is damaged: its configuration has %d bytes", size)
	}
	out, layers, err := describe(i, o)
	if err != nil {
		return nil, nil, err
	}
	digest, err := i.Digest()
	if err != nil {
		return nil, nil, explainDamage(err)
	}
	out.Digest = digest.String()
	return out, layers, nil
}

// describe checks what an image says of itself, and takes over what is kept of it.
func describe(i v1.Image, o Options) (*Image, []v1.Layer, error) {
	config, err := i.ConfigFile()
	if err != nil {
		return nil, nil, explainDamage(err)
	}
	if config.OS != "" && config.OS != "linux" || config.Architecture != "" && config.Architecture != o.Architecture {
		return nil, nil, fault.New(fault.Precondition, "the image is for %s/%s, this machine runs linux/%s", config.OS, config.Architecture, o.Architecture)
	}
	layers, err := i.Layers()
	if err != nil {
		return nil, nil, explainDamage(err)
	}
	if len(layers) == 0 || len(layers) > maxLayers {
		return nil, nil, fault.New(fault.Precondition, "the image has %d layers", len(layers))
	}
	return &Image{Env: config.Config.Env}, layers, nil
}

// explainDamage makes a fault of whatever a file with an image did not hold.
func explainDamage(err error) error {
	if fault.KindOf(err) != fault.Unexpected {
		return err
	}
	return fault.Wrap(fault.Precondition, err, "the image is damaged")
}

// open makes a layer of stored bytes. Its content is checked against the image's configuration when it is
// first read to its end.
func open(l v1.Layer, stored func() (io.ReadCloser, error)) (layer.Layer, error) {
	media, err := l.MediaType()
	if err != nil {
		return nil, explainDamage(err)
	}
	if !media.IsLayer() || media == types.DockerForeignLayer || strings.Contains(string(media), "encrypted") {
		return nil, fault.New(fault.Precondition, "the image has a layer of type %s, which cannot be read", media)
	}
	want, err := l.DiffID()
	if err != nil {
		return nil, explainDamage(err)
	}
	var checked atomic.Bool
	return func() (io.ReadCloser, error) {
		packed, err := stored()
		if err != nil {
			return nil, err
		}
		content, err := debian.Decompress(packed)
		if err != nil {
			return nil, errors.Join(explainDamage(err), packed.Close())
		}
		s := &stream{r: content, close: []io.Closer{content, packed}}
		if !checked.Load() {
			s.sum, s.want, s.good = sha256.New(), want.Hex, func() { checked.Store(true) }
		}
		return s, nil
	}, nil
}

// stream is an unpacked layer.
type stream struct {
	r     io.Reader
	close []io.Closer
	sum   hash.Hash // nil: it was checked before
	want  string
	good  func()
}

func (s *stream) Read(b []byte) (int, error) {
	n, err := s.r.Read(b)
	if s.sum == nil {
		return n, err
	}
	_, _ = s.sum.Write(b[:n]) // a hash never fails
	if errors.Is(err, io.EOF) {
		if got := hex.EncodeToString(s.sum.Sum(nil)); got != s.want {
			return n, fault.New(fault.Precondition, "a layer of the image is damaged: its checksum is %s instead of %s", got, s.want)
		}
		s.good()
	}
	return n, err
}

func (s *stream) Close() error {
	var errs []error
	for _, c := range s.close {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}

// openAll makes layers that are read from where the image is, each by read.
func openAll(out *Image, layers []v1.Layer, read func(v1.Layer) (io.ReadCloser, error)) (*Image, error) {
	for _, l := range layers {
		opened, err := open(l, func() (io.ReadCloser, error) {
			r, err := read(l)
			if err != nil {
				return nil, explainDamage(err)
			}
			return r, nil
		})
		if err != nil {
			return nil, err
		}
		out.Layers = append(out.Layers, opened)
	}
	return out, nil
}

// copyContext copies until the end, or the end of ctx.
func copyContext(ctx context.Context, w io.Writer, r io.Reader) (int64, error) {
	return io.Copy(w, readerFunc(func(b []byte) (int, error) {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		return r.Read(b)
	}))
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(b []byte) (int, error) { return f(b) }

// unpackTo writes a new file of what an archive holds, whose size is not known before, as far as there is room.
func (o Options) unpackTo(ctx context.Context, path string, r io.Reader) (written int64, err error) {
	err = writeNew(ctx, path, readerFunc(func(b []byte) (int, error) {
		n, err := r.Read(b)
		written += int64(n)
		if err := o.hasRoom(written); err != nil {
			return 0, err
		}
		if err != nil && !errors.Is(err, io.EOF) {
			err = explainDamage(err)
		}
		return n, err
	}))
	return written, err
}

// writeNew writes a new file.
func writeNew(ctx context.Context, path string, r io.Reader) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	if _, err = copyContext(ctx, f, r); err != nil {
		err = fmt.Errorf("cannot write %s: %w", path, err)
	}
	return errors.Join(err, f.Close())
}
