//! Limits of connections to a store that somebody else may have written.

use super::*;

#[test]
fn connections_have_limits_of_their_own() {
    check(|dir| async move {
        let writing = open(&dir).await;
        let reading = Store::open(&dir, Access::ReadOnly).await.unwrap();
        for store in [&writing, &reading] {
            let mut connection = store.pool().acquire().await.unwrap();
            let longer = sqlx::query("select length(zeroblob(201326593))")
                .fetch_one(&mut *connection)
                .await;
            let said = StoreError::from(longer.map(drop).unwrap_err()).to_string();
            assert!(said.contains("longer than 192 MiB"), "{said}");
            sqlx::query("pragma writable_schema = on")
                .execute(&mut *connection)
                .await
                .unwrap();
            for off in ["pragma writable_schema", "pragma trusted_schema"] {
                let value: i64 = sqlx::query_scalar(off)
                    .fetch_one(&mut *connection)
                    .await
                    .unwrap();
                assert_eq!(value, 0, "{off}");
            }
        }
        let heap: i64 = sqlx::query_scalar("pragma hard_heap_limit")
            .fetch_one(reading.pool())
            .await
            .unwrap();
        assert!((1..=1 << 30).contains(&heap), "{heap}");
    });
}

#[test]
fn a_statement_ends_when_nobody_waits_for_it() {
    check(|dir| async move {
        open(&dir).await.close().await;
        let store = Store::open(&dir, Access::ReadOnly).await.unwrap();
        let endless = || {
            let sql = "with recursive n(i) as (select 1 union all select i + 1 from n) select max(i) from n";
            sqlx::query(sql).fetch_one(store.pool())
        };
        // As many as there are connections.
        for _ in 0..2 {
            let abandoned = within(Duration::from_secs(600), endless());
            let answer = tokio::time::timeout(Duration::from_millis(50), abandoned).await;
            assert!(answer.is_err());
        }
        let free = store.list_runs(&RunFilter::default()).await;
        free.expect("a connection without a statement");
        let late = within(Duration::from_millis(50), endless()).await;
        let said = StoreError::from(late.map(drop).unwrap_err()).to_string();
        assert!(said.contains("took too long"), "{said}");
    });
}

#[test]
fn a_statement_that_writes_has_no_deadline() {
    check(|dir| async move {
        let counted: i64 = within(Duration::ZERO, async {
            let store = open(&dir).await;
            let long = "with recursive n(i) as (select 1 union all select i + 1 from n where i < 100000) select count(*) from n";
            sqlx::query_scalar(long).fetch_one(store.pool()).await
        })
        .await
        .unwrap();
        assert_eq!(counted, 100_000);
    });
}
