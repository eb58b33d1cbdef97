package main

import (
	"errors"
	"strings"
	"testing"
	"time"
)

// env is a lookup over a base that is complete, changed by pairs; a value of "-" unsets.
func env(pairs ...string) func(string) (string, bool) {
	m := map[string]string{"LOCAL_XDS_PATH": "/w.yaml", "LOCAL_CA_DIR": "/ca"}
	for i := 0; i < len(pairs); i += 2 {
		if pairs[i+1] == "-" {
			delete(m, pairs[i])
			continue
		}
		m[pairs[i]] = pairs[i+1]
	}
	return func(k string) (string, bool) { v, ok := m[k]; return v, ok }
}

func TestDefaults(t *testing.T) {
	c, err := loadConfig(env())
	if err != nil {
		t.Fatal(err)
	}
	if c.StreamWindow != 4<<20 || c.ConnWindow != 16<<20 || c.FrameSize != 1<<20 || c.PoolMaxStreams != 100 || c.PoolUnused != 5*time.Minute {
		t.Errorf("HTTP/2 defaults: %+v", c)
	}
	if c.AdminPort != 15000 || c.StatsPort != 15020 || c.ReadinessPort != 15021 || c.TerminationDeadline != 5*time.Second {
		t.Errorf("ports or deadline: %+v", c)
	}
	if c.KeepaliveTime != 180*time.Second || c.KeepaliveRetries != 9 || !c.KeepaliveEnabled || c.UserTimeout {
		t.Errorf("keepalive: %+v", c)
	}
	if c.Socket != "/var/run/ztun/ztun.sock" || c.MTU != 1500 || c.NodeTUN != "ztun-node" || c.SecretTTL != 24*time.Hour {
		t.Errorf("own settings: %+v", c)
	}
}

func TestBadValuesNameTheVariable(t *testing.T) {
	for _, tc := range []struct{ name, value, says string }{
		{"IPV6_ENABLED", "True", "true or false"},
		{"KEEPALIVE_ENABLED", "", "true or false"},
		{"HTTP2_STREAM_WINDOW_SIZE", "0x10", "decimal"},
		{"HTTP2_FRAME_SIZE", "1", "from 16384"},
		{"POOL_MAX_STREAMS_PER_CONNECTION", "0", "from 1"},
		{"POOL_UNUSED_RELEASE_TIMEOUT", "soon", "no duration"},
		{"SECRET_TTL", "1s", "shorter than 10s"},
		{"PROXY_MODE", "dedicated", "iptables"},
		{"XDS_ADDRESS", "istiod:15012", "LOCAL_XDS_PATH"},
		{"LOCAL_XDS_PATH", "-", "workload file"},
		{"LOCAL_CA_DIR", "-", "ztun ca init"},
		{"FAKE_CA", "true", "LOCAL_CA_DIR"},
		{"LOCAL_XDS", "{}", "LOCAL_XDS_PATH"},
		{"PROXY_CONFIG", "{", "yaml"},
		{"TERMINATION_GRACE_PERIOD_SECONDS", "-1", "whole number"},
		{"ZTUNNEL_WORKER_THREADS", "many", "percentage"},
		{"ZTUNNEL_WORKER_THREADS", "101%", "percentage"},
		{"ZTUNNEL_RESOURCE_CPU_LIMIT", "0", "quantity"},
		{"ZTUN_MTU", "100", "1280"},
		{"ZTUN_NODE_TUN", "a-name-that-is-too-long", "15 characters"},
		{"ZTUN_MAX_INFLIGHT", "0", "from 1"},
		{"HTTP2_CONNECTION_WINDOW_SIZE", "65535", "HTTP2_STREAM_WINDOW_SIZE"},
	} {
		t.Run(tc.name+"="+tc.value, func(t *testing.T) {
			_, err := loadConfig(env(tc.name, tc.value))
			var ce *configError
			if !errors.As(err, &ce) {
				t.Fatalf("got %v, want a configError", err)
			}
			if text := err.Error(); !strings.Contains(text, "invalid env var "+tc.name) || !strings.Contains(text, tc.says) || strings.Contains(text, "\n") {
				t.Errorf("message %q", text)
			}
		})
	}
}

func TestTerminationDeadline(t *testing.T) { // spec controlplane checklist 8
	for value, want := range map[string]time.Duration{"30": 25 * time.Second, "11": 6 * time.Second, "10": 9 * time.Second, "1": time.Second, "0": time.Second} {
		c, err := loadConfig(env("TERMINATION_GRACE_PERIOD_SECONDS", value))
		if err != nil || c.TerminationDeadline != want {
			t.Errorf("grace %s: %v, %v; want %v", value, c.TerminationDeadline, err, want)
		}
	}
	c, err := loadConfig(env("TERMINATION_GRACE_PERIOD_SECONDS", "30", "CONNECTION_TERMINATION_DEADLINE", "1s"))
	if err != nil || c.TerminationDeadline != time.Second {
		t.Errorf("explicit deadline: %v, %v", c.TerminationDeadline, err)
	}
}

func TestWorkerThreads(t *testing.T) { // spec controlplane 9.2
	two, zero := uint16(2), uint16(0)
	for _, tc := range []struct {
		explicit                       string
		concurrency                    *uint16
		limit, request, cpuLimit, cpus int
		want                           int
	}{
		{"", nil, 16, 0, 0, 64, 16},
		{"", nil, 1, 0, 0, 64, 1},
		{"", nil, 4, 8, 0, 64, 8},
		{"", nil, 0, 0, 0, 32, 8},
		{"", nil, 0, 0, 0, 4, 2},
		{"30%", nil, 0, 0, 0, 16, 5},
		{"10%", nil, 0, 0, 0, 4, 1},
		{"0", nil, 0, 0, 0, 4, 4},
		{"3", &two, 0, 0, 0, 4, 3},
		{"", &two, 0, 0, 0, 8, 2},
		{"", &zero, 0, 0, 0, 8, 8},
		{"0", nil, 0, 0, 6, 8, 6},
	} {
		got, err := workerThreads(tc.explicit, tc.concurrency, tc.limit, tc.request, tc.cpuLimit, tc.cpus)
		if err != nil || got != tc.want {
			t.Errorf("%+v: got %d, %v", tc, got, err)
		}
	}
	var n int
	for v, want := range map[string]int{"500m": 1, "2500m": 3, "1.5": 2, "2": 2} {
		if err := quantity(&n)(v); err != nil || n != want {
			t.Errorf("quantity %s: %d, %v", v, n, err)
		}
	}
}

func TestParseDuration(t *testing.T) {
	for s, want := range map[string]time.Duration{
		"300s": 300 * time.Second, "5m": 5 * time.Minute, "1h30m": 90 * time.Minute, "100ms": 100 * time.Millisecond,
		"7": 7 * time.Second, " 1m + 30s ": 90 * time.Second, "1d": 24 * time.Hour,
	} {
		if got, err := parseDuration(s); err != nil || got != want {
			t.Errorf("%q: %v, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "x", "5 parsecs", "-1s", "9999999999999h"} {
		if got, err := parseDuration(s); err == nil {
			t.Errorf("%q: %v, want an error", s, got)
		}
	}
}

func TestHelpNamesEveryVariable(t *testing.T) {
	help := helpTable()
	for _, v := range variables(&Config{}, &loader{}) {
		if !strings.Contains(help, v.name) || v.help == "" {
			t.Errorf("%s is not explained", v.name)
		}
	}
}
