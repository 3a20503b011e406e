package server_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	bangerv1 "banger/api/banger/v1"
	"banger/api/banger/v1/bangerv1connect"
	"banger/internal/server"
	"banger/internal/vm"
)

var procedures = []string{
	bangerv1connect.VMServiceCreateVMProcedure, bangerv1connect.VMServiceListVMsProcedure, bangerv1connect.VMServiceGetVMProcedure,
	bangerv1connect.VMServiceStartVMProcedure, bangerv1connect.VMServiceStopVMProcedure, bangerv1connect.VMServiceDeleteVMProcedure,
	bangerv1connect.VMServicePingVMProcedure, bangerv1connect.VMServiceExecVMProcedure, bangerv1connect.VMServiceReadLogProcedure,
	bangerv1connect.VMServiceListEventsProcedure, bangerv1connect.VMServiceGetSSHEndpointProcedure,
	bangerv1connect.ImageServiceGetImageProcedure, bangerv1connect.ImageServiceSetupProcedure,
	bangerv1connect.DaemonServiceGetStatusProcedure, bangerv1connect.DaemonServiceShutdownProcedure,
	"/", "/hello", "/banger.v1.VMService/", "/banger.v1.VMService/Nothing", "/../../etc/passwd",
}

var contentTypes = []string{
	"application/json", "application/proto", "application/connect+json", "application/connect+proto", "application/grpc",
	"application/grpc-web+proto", "text/plain", "", "application/connect+", "application/json; charset=utf-16",
}

// FuzzHandler sends what no client of ours sends. The handler may refuse it in any way it likes, but
// neither panic nor hang, and an engine's panic must not show as anything but an answer.
func FuzzHandler(f *testing.F) {
	valid, err := proto.Marshal(&bangerv1.CreateVMRequest{Spec: &bangerv1.VMSpec{Name: "web"}})
	if err != nil {
		f.Fatal(err)
	}
	frame := append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(valid))), valid...)
	bodies := [][]byte{
		nil, []byte("{}"), []byte(`{"vm":"web"}`), []byte(`{"spec":{"name":"panic"}}`), []byte(`{"spec":{"cpus":-1,"memoryBytes":"x"}}`),
		valid, frame, frame[:3], frame[:len(frame)-1], append([]byte{0xff, 0xff, 0xff, 0xff, 0xff}, valid...),
		append([]byte{1}, frame[1:]...), append([]byte{2, 0, 0, 0, 2}, "{}"...), bytes.Repeat([]byte("{"), 5000),
	}
	for i := range procedures {
		for j := range contentTypes {
			f.Add(uint8(i), "POST", uint8(j), "", bodies[(i*len(contentTypes)+j)%len(bodies)])
		}
	}
	f.Add(uint8(1), "GET", uint8(0), "encoding=json&message=%7B%7D&connect=v1", []byte(nil))
	f.Add(uint8(2), "GET", uint8(0), "encoding=proto&base64=1&message=%%%&compression=gzip", []byte(nil))
	f.Add(uint8(0), "PUT\x00", uint8(3), "", []byte("x"))

	w := newWorld()
	w.vms["web"] = vm.VM{ID: "0badc0de", Spec: vm.Spec{Name: "web"}, State: vm.Stopped}
	handler := server.New(options(f, w))
	f.Fuzz(func(t *testing.T, procedure uint8, method string, contentType uint8, query string, body []byte) {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		path := procedures[int(procedure)%len(procedures)]
		r := (&http.Request{
			Method: method, Proto: "HTTP/2.0", ProtoMajor: 2, Host: "bangerd", RemoteAddr: "@", RequestURI: path,
			URL: &url.URL{Path: path, RawQuery: query}, Header: http.Header{}, ContentLength: int64(len(body)),
			Body: io.NopCloser(bytes.NewReader(body)),
		}).WithContext(ctx)
		r.Header.Set("Content-Type", contentTypes[int(contentType)%len(contentTypes)])
		answer := httptest.NewRecorder()
		begin := time.Now()
		handler.ServeHTTP(answer, r)
		if took := time.Since(begin); took > 5*time.Second {
			t.Errorf("%s %s took %s", method, path, took)
		}
		if answer.Code < 200 || answer.Code > 599 || answer.Header().Get("Banger-Build") == "" {
			t.Errorf("%s %s: status %d, headers %v", method, path, answer.Code, answer.Header())
		}
		if strings.Contains(answer.Body.String(), "goroutine ") {
			t.Errorf("%s %s: a trace went to the client", method, path)
		}
	})
}
