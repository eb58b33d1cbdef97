package main

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// What is handed over by a socket is one descriptor, with the first message.
func TestReceiveFile(t *testing.T) {
	for name, test := range map[string]struct {
		files int
		say   string
		want  string // in the error; "": a file
	}{
		"one": {1, "x", ""}, "none": {0, "x", "0 descriptors were sent"}, "two": {2, "x", "2 descriptors were sent"},
		"many": {20, "x", "descriptors were sent"}, "nothing": {0, "", "no descriptor was sent"},
	} {
		path := filepath.Join(t.TempDir(), "s")
		ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
		if err != nil {
			t.Fatal(err)
		}
		sent := make(chan error, 1)
		go func() {
			sent <- func() error {
				c, err := ln.AcceptUnix()
				if err != nil {
					return err
				}
				defer c.Close()
				if test.say == "" {
					return nil
				}
				var fds []int
				for range test.files {
					fds = append(fds, 1)
				}
				var oob []byte
				if len(fds) > 0 {
					oob = unix.UnixRights(fds...)
				}
				_, _, err = c.WriteMsgUnix([]byte(test.say), oob, nil)
				return err
			}()
			ln.Close()
		}()
		f, err := receiveFile(t.Context(), path)
		got := ""
		if err != nil {
			got = err.Error()
		} else {
			f.Close()
		}
		if (got == "") != (test.want == "") || !strings.Contains(got, test.want) {
			t.Errorf("%s: %q, want %q", name, got, test.want)
		}
		ln.Close()
		<-sent
	}
	if _, err := receiveFile(t.Context(), filepath.Join(t.TempDir(), "s")); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := (&runGiven{fd: 9999}).tun(ctx); err == nil || !strings.Contains(err.Error(), "--tun-fd 9999: bad file") {
		t.Error(err)
	}
}
