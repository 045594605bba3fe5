package client

import (
	"context"
	"net/http"
	"strconv"
	"time"
)

// Lease keeps the checkpoints of a step from retention until it expires.
type Lease struct {
	ID      string    `json:"id"`
	Step    int64     `json:"step"`
	Holder  string    `json:"holder"`
	Created time.Time `json:"created"`
	Expires time.Time `json:"expires"`
}

func leasePath(job string, step int64, rest ...string) string {
	return jobPath(job, append([]string{"checkpoints", strconv.FormatInt(step, 10), "leases"}, rest...)...)
}

// Lease takes a lease of a step's checkpoint. It holds once it is returned.
func (c *Client) Lease(ctx context.Context, job string, step int64, holder string, ttl time.Duration) (Lease, error) {
	var l Lease
	k, err := post(leasePath(job, step), map[string]string{"holder": holder, "ttl": ttl.String()})
	if err != nil {
		return l, err
	}
	err = c.json(ctx, k, &l)
	return l, err
}

// Leases lists the leases of a step that hold.
func (c *Client) Leases(ctx context.Context, job string, step int64) ([]Lease, error) {
	var list struct {
		Leases []Lease `json:"leases"`
	}
	err := c.json(ctx, get(leasePath(job, step), nil), &list)
	return list.Leases, err
}

// Renew makes a lease last for ttl from now; "lease_not_found" when it has ended.
func (c *Client) Renew(ctx context.Context, job string, l Lease, ttl time.Duration) (Lease, error) {
	k, err := post(leasePath(job, l.Step, l.ID), map[string]string{"ttl": ttl.String()})
	if err != nil {
		return l, err
	}
	k.method = http.MethodPut
	err = c.json(ctx, k, &l)
	return l, err
}

// Release ends a lease. One that has ended is no error.
func (c *Client) Release(ctx context.Context, job string, l Lease) error {
	err := c.json(ctx, call{method: http.MethodDelete, path: leasePath(job, l.Step, l.ID)}, nil)
	if Code(err) == "lease_not_found" {
		return nil
	}
	return err
}
