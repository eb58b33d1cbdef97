// Command quic is a QUIC client and server (quic-go) for tests of what carries UDP: bytes go there and back, and must
// be the same.
//
//	quic serve ADDR:PORT          echoes streams; says "listening"
//	quic echo ADDR:PORT BYTES     sends so many bytes, and prints {"bytes":N,"seconds":S,"gso":true} when they are
//	                              back
//
// It is a module of its own, so that ztun's own go.mod stays lean.
package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	crand "crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"math/rand/v2"
	"os"
	"strconv"
	"time"

	"github.com/quic-go/quic-go"
)

const protocol = "ztun-test"

func main() {
	var err error
	switch args := os.Args[1:]; {
	case len(args) == 2 && args[0] == "serve":
		err = serve(args[1])
	case len(args) == 3 && args[0] == "echo":
		var n int64
		if n, err = strconv.ParseInt(args[2], 10, 64); err == nil {
			err = echo(args[1], n)
		}
	default:
		err = errors.New("usage: quic serve ADDR:PORT | quic echo ADDR:PORT BYTES")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "quic:", err)
		os.Exit(1)
	}
}

// config: windows that do not hold back a transfer of a few hundred megabits.
func config() *quic.Config {
	return &quic.Config{
		InitialStreamReceiveWindow: 4 << 20, MaxStreamReceiveWindow: 16 << 20,
		InitialConnectionReceiveWindow: 8 << 20, MaxConnectionReceiveWindow: 32 << 20, MaxIdleTimeout: 20 * time.Second,
	}
}

func serve(addr string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	if err != nil {
		return err
	}
	t := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(crand.Reader, t, t, key.Public(), key)
	if err != nil {
		return err
	}
	ln, err := quic.ListenAddr(addr, &tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, NextProtos: []string{protocol},
	}, config())
	if err != nil {
		return err
	}
	fmt.Println("listening")
	for {
		c, err := ln.Accept(context.Background())
		if err != nil {
			return err
		}
		go func() {
			for {
				s, err := c.AcceptStream(context.Background())
				if err != nil {
					return
				}
				go func() {
					defer s.Close()
					io.CopyBuffer(s, s, make([]byte, 256<<10))
				}()
			}
		}()
	}
}

func echo(addr string, n int64) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	// The address is what is tested, not who answers at it.
	c, err := quic.DialAddr(ctx, addr, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{protocol}}, config())
	if err != nil {
		return err
	}
	defer c.CloseWithError(0, "")
	s, err := c.OpenStreamSync(ctx)
	if err != nil {
		return err
	}
	began := time.Now()
	sent, got := sha256.New(), sha256.New()
	failed := make(chan error, 1)
	go func() {
		_, err := io.CopyBuffer(io.MultiWriter(s, sent), io.LimitReader(rand.NewChaCha8([32]byte{}), n),
			make([]byte, 256<<10))
		failed <- errors.Join(err, s.Close())
	}()
	back, err := io.Copy(got, s)
	if err = errors.Join(err, <-failed); err != nil {
		return err
	}
	if back != n || string(got.Sum(nil)) != string(sent.Sum(nil)) {
		return fmt.Errorf("%d bytes of %d came back, or others", back, n)
	}
	return json.NewEncoder(os.Stdout).Encode(map[string]any{
		"bytes": n, "seconds": time.Since(began).Seconds(), "gso": c.ConnectionState().GSO,
	})
}
