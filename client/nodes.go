package client

import (
	"context"
	"net/http"
	"net/url"
	"time"
)

// NodeReport is what an inference node says of itself.
type NodeReport struct {
	Step    int64  // that it serves, -1: none yet
	Digest  string // of that checkpoint's manifest
	State   string // serving, loading, failed or stopped
	Message string
	TTL     time.Duration // how long the report is good for; 0: a minute
}

// Node is an inference node as the server knows it.
type Node struct {
	Name       string    `json:"node"`
	Step       int64     `json:"step"`
	Digest     string    `json:"digest"`
	State      string    `json:"state"`
	Message    string    `json:"message"`
	FirstSeen  time.Time `json:"first_seen"`
	LastSeen   time.Time `json:"last_seen"`
	Silent     bool      `json:"silent"`
	Matches    *bool     `json:"matches"` // the digest is that of the step's checkpoint; nil: not known
	LagSteps   int64     `json:"lag_steps"`
	LagSeconds float64   `json:"lag_seconds"`
}

// ReportNode says what a node serves.
func (c *Client) ReportNode(ctx context.Context, job, node string, r NodeReport) error {
	body := map[string]any{"step": r.Step, "digest": r.Digest, "state": r.State, "message": r.Message}
	if r.TTL > 0 {
		body["ttl"] = r.TTL.String()
	}
	k, err := post(jobPath(job, "nodes", url.PathEscape(node)), body)
	if err != nil {
		return err
	}
	k.method = http.MethodPut
	return c.json(ctx, k, nil)
}

// Nodes lists which inference node serves which step.
func (c *Client) Nodes(ctx context.Context, job string) ([]Node, error) {
	var list struct {
		Nodes []Node `json:"nodes"`
	}
	err := c.json(ctx, get(jobPath(job, "nodes"), nil), &list)
	return list.Nodes, err
}
