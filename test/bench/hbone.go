package main

import "context"

const bareTLS = "bare TLS"

func (b *bench) hboneCases(ctx context.Context) ([]kase, error) { return nil, nil }
