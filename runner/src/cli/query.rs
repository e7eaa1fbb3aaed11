//! `retort query`.

use std::ops::ControlFlow;
use std::time::Duration;

use crate::cli::{Context, Error, Exit, FormatArgs, is_thread_of_history, output};
use crate::store::{Access, QueryPiece, Store, StoreError};
use crate::table::{Cell, Stream};

/// Arguments of `query`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The same as the argument.
    #[arg(long, value_name = "SQL")]
    pub sql: Option<String>,
    /// One SQL statement; without it, the views and their columns are printed.
    #[arg(value_name = "SQL", conflicts_with = "sql")]
    pub statement: Option<String>,
    /// How long the next row may take; a statement that takes longer is ended.
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = crate::duration::parse)]
    pub timeout: Duration,
    /// Output format.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// Runs a read-only SQL query on the history.
pub fn execute(args: &Args, context: &Context) -> Result<(), Error> {
    let sql = args.sql.as_ref().or(args.statement.as_ref());
    let style = args.format.style(context);
    let mut stream = None;
    let mut written = Ok(true);
    let take = |answer: QueryPiece<'_>| {
        written = match answer {
            QueryPiece::Heads(heads) => Stream::new(heads, style, output::stdout())
                .map(|begun| stream.replace(begun).is_none()),
            QueryPiece::Row(row) => match &mut stream {
                Some(stream) => stream.push(row.into_iter().map(Cell::from).collect()),
                None => Ok(true),
            },
        };
        match written {
            Ok(true) => ControlFlow::Continue(()),
            Ok(false) | Err(_) => ControlFlow::Break(()),
        }
    };
    keep_quiet();
    context.runtime()?.block_on(async {
        let store = Store::open(&context.store, Access::ReadOnly).await?;
        let sql = sql.map_or(VIEWS, String::as_str);
        let answer = store.query(sql, args.timeout, take).await;
        store.close().await;
        answer.map_err(of_statement)
    })?;
    let more = !written?;
    let shown = stream.map(Stream::end).transpose()?;
    if more && let Some(shown) = shown {
        output::say(&format!(
            "only the first {} are shown; `--format csv` and `--format json` give all",
            output::count(shown, "row")
        ));
    }
    Ok(())
}

/// The library's thread panics if a value's copy does not fit in memory. The broken connection is reported as an error.
fn keep_quiet() {
    let others = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if !is_thread_of_history() {
            others(panic);
        }
    }));
}

/// Errors in the statement are the user's to fix.
fn of_statement(error: StoreError) -> Error {
    let wrong = || Error::new(Exit::Usage, "the statement failed");
    let error = match error {
        StoreError::Sql(error) => error,
        several @ StoreError::SeveralStatements { .. } => {
            return wrong().cause(&several).hint("ask one question at a time");
        }
        endless @ StoreError::Endless { .. } => return wrong().cause(&endless).hint(MORE),
        error => return error.into(),
    };
    if matches!(error, sqlx::Error::WorkerCrashed) {
        let mut shown = wrong().hint("query fewer columns at a time, or shorter values");
        let cause = "a row of the answer does not fit in memory";
        shown.causes.push(cause.to_owned());
        return shown;
    }
    let Some(database) = error.as_database_error() else {
        return StoreError::Sql(error).into();
    };
    let mut shown = wrong().hint(HINT);
    shown.causes.push(match database.code().as_deref() {
        // SQLITE_AUTH gives no details.
        Some("23") => format!(
            "only reading the history is allowed ({})",
            database.message()
        ),
        _ => database.message().to_owned(),
    });
    shown
}

const MORE: &str = "query less, or allow more time: `--timeout 10m`";
const HINT: &str = "`retort query` without a statement lists the views and their columns";

/// The tables for queries: the views are stable, the tables under them may change.
const VIEWS: &str = "select v.name as view, group_concat(c.name, ', ') as columns
from sqlite_schema v join pragma_table_info(v.name) c
where v.type = 'view' and v.name glob 'v_*'
group by v.name order by v.name";
